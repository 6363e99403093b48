"""Look at a model before it is folded: what its layers are given, and what becomes of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from batchnorm.models.calling import Forward
from batchnorm.models.graph import Graph, is_linear
from batchnorm.models.norms import is_norm, layers_of_domains
from batchnorm.models.one_pass import BY_HOOKS
from batchnorm.models.tracing import graph_of
from batchnorm.repair.folding.affine import (
    Linear,
    channels_given,
    channels_taken,
    folded_parameters,
)
from batchnorm.repair.folding.change import Change
from batchnorm.repair.folding.fitness import (
    Norm,
    Tied,
    UnfitError,
    check_linear,
    has_own_forward,
    norm_of,
)
from batchnorm.repair.folding.plan import Plan, plan_of
from batchnorm.repair.folding.trial import Call, Trial

__all__ = ["survey"]

Parameters = dict[Linear, tuple[nn.Parameter, nn.Parameter | None]]


def survey(
    model: nn.Module,
    norms: Mapping[str, nn.Module],
    trial: Trial,
    example: Any,
    forward: Forward | None,
) -> tuple[Plan, Change]:
    """What is to be folded, and the change to the model that does it.

    Raises `ValueError` where nothing reads the order of the model's operations.
    """
    linears = [module for module in model.modules() if is_linear(module)]
    own = [module for module in (*norms.values(), *linears) if has_own_forward(module)]
    ndims = trial.ndims({*norms.values()})
    calls = dict(trial.calls({*own}) if own else ())
    graph = graph_of(model, example, forward)
    if graph is None:
        raise ValueError(
            "nothing could read the order of the model's operations: neither torch.fx nor hooks "
            "on one pass; fold a part of the model"
        )
    tied = Tied(model, graph)
    fit, refused = _fit(model, norms, tied, calls)
    unfit = _unfit(graph, tied, calls)
    if graph.read_by == BY_HOOKS:
        unfit = _sometimes_normalized(model, graph) | unfit
    while True:
        plan = plan_of(graph, fit, ndims, unfit)
        parameters = {
            module: folded_parameters(module, target.taken, target.given)
            for module, target in plan.targets.items()
        }
        overflowing = {plan.targets[m].path for m, new in parameters.items() if not _is_finite(new)}
        if not overflowing:
            plan.refused = refused | plan.refused
            return plan, _change(model, plan, parameters)
        for norm, into in plan.folded.items():
            if overflowing & {*into}:
                refused[norm.path] = f"the weights of {into[0]} would not be finite any more"
                fit.remove(norm)


def _fit(
    model: nn.Module,
    norms: Mapping[str, nn.Module],
    tied: Tied,
    calls: Mapping[nn.Module, Call],
) -> tuple[list[Norm], dict[str, str]]:
    """The batch norms that are constants; and why the others are none."""
    of_domains = layers_of_domains(model)
    fit: list[Norm] = []
    refused: dict[str, str] = {}
    for path, module in norms.items():
        try:
            if module in of_domains:
                raise UnfitError("it is of one domain, and its neighbours are of all")
            tied.check_taken(module)
            fit.append(norm_of(path, module, calls))
        except UnfitError as reason:
            refused[path] = str(reason)
    return fit, refused


def _unfit(graph: Graph, tied: Tied, calls: Mapping[nn.Module, Call]) -> dict[nn.Module, str]:
    """Why a linear module cannot take anything up, for those that cannot."""
    unfit: dict[nn.Module, str] = {}
    for module in {node.module: None for node in graph.nodes}:
        if isinstance(module, Linear):
            try:
                check_linear(module, tied, calls.get(module))
            except UnfitError as reason:
                unfit[module] = str(reason)
    return unfit


def _sometimes_normalized(model: nn.Module, graph: Graph) -> dict[nn.Module, str]:
    """Linear modules that norms may lie beside which another example would go through.

    One pass shows one way through the model; where torch.fx reads it, none depends on values.
    """
    called = {node.module for node in graph.nodes}
    waiting = {_channels(norm) for norm in model.modules() if is_norm(norm) and norm not in called}
    return {
        module: "the model has norms that it calls at other times, perhaps beside it"
        for module in called
        if isinstance(module, Linear) and {channels_given(module), channels_taken(module)} & waiting
    }


def _channels(norm: nn.Module) -> int | None:
    mean = getattr(norm, "running_mean", None)
    channels: int | None = getattr(norm, "num_features", None)
    return len(mean) if isinstance(mean, Tensor) else channels


def _is_finite(parameters: tuple[nn.Parameter, nn.Parameter | None]) -> bool:
    return all(bool(p.isfinite().all()) for p in parameters if p is not None)


def _change(model: nn.Module, plan: Plan, parameters: Parameters) -> Change:
    change = Change()
    for module, (weight, bias) in parameters.items():
        change.set_parameter(module, "weight", weight)
        change.set_parameter(module, "bias", bias)
    for norm, rest in plan.rests.items():
        change.replace(model, norm.module, rest)
    return change
