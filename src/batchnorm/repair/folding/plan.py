"""Which batch norm goes into which module, read off the graph; nothing is done here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from batchnorm.models.affine import Affine
from batchnorm.models.graph import Graph, Node
from batchnorm.repair.folding.affine import (
    Linear,
    Transposed,
    channels_given,
    channels_taken,
)
from batchnorm.repair.folding.fitness import Norm, UnfitError, has_own_forward

__all__ = ["Plan", "Target", "plan_of"]


@dataclass(eq=False)
class Target:
    """A linear module, and what it is to do besides.

    - `path`: where it is.
    - `taken`, `given`: of its input and of its output.
    - `last`: where what it gives is the same as before: behind the last norm that goes into it.
    """

    path: str
    taken: Affine
    given: Affine
    last: str


@dataclass(eq=False)
class Plan:
    """What to do.

    - `targets`: the linear modules that change.
    - `folded`: the norms, and which modules each goes into.
    - `refused`: by path, why a norm stays.
    - `rests`: what is left of each norm that goes.
    """

    targets: dict[Linear, Target] = field(default_factory=dict)
    folded: dict[Norm, tuple[str, ...]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    rests: dict[Norm, nn.Module] = field(default_factory=dict)


def plan_of(
    graph: Graph,
    norms: list[Norm],
    ndims: Mapping[nn.Module, set[int]],
    unfit: Mapping[nn.Module, str],
) -> Plan:
    """Fold what can be into what comes before it, then what is left into what comes behind it.

    - `ndims`: how many dimensions the norms' inputs have.
    - `unfit`: why a linear module cannot take anything up, for those that cannot.
    """
    return _Planner(graph, norms, ndims, unfit).plan()


class _Planner:
    def __init__(
        self,
        graph: Graph,
        norms: list[Norm],
        ndims: Mapping[nn.Module, set[int]],
        unfit: Mapping[nn.Module, str],
    ) -> None:
        self._consumers, self._ndims, self._unfit = graph.consumers(), ndims, unfit
        self._calls: dict[nn.Module, list[Node]] = {}
        for node in graph.nodes:
            if node.module is not None:
                self._calls.setdefault(node.module, []).append(node)
        order = {module: at for at, module in enumerate(self._calls)}
        self._norms = sorted(norms, key=lambda norm: order.get(norm.module, len(order)))
        self._gone: set[nn.Module] = set()
        self._plan = Plan()

    def plan(self) -> Plan:
        reasons: dict[Norm, list[str]] = {norm: [] for norm in self._norms}
        for fold in (self._backwards, self._forwards):
            is_going_on = True
            while is_going_on:  # what goes may let its neighbour go
                left = [norm for norm in self._norms if norm not in self._plan.folded]
                said = {norm: self._try(fold, norm) for norm in left}
                is_going_on = None in said.values()
            for norm, reason in said.items():
                if reason is not None and reason not in reasons[norm]:
                    reasons[norm].append(reason)
        for norm in self._norms:
            if norm not in self._plan.folded:
                self._plan.refused[norm.path] = ", and ".join(reasons[norm])
        return self._plan

    def _try(self, fold: Callable[[Norm], None], norm: Norm) -> str | None:
        """Fold a norm; or say why not."""
        if norm.module not in self._calls:
            return "no call of it was seen"
        try:
            fold(norm)
        except UnfitError as refused:
            return str(refused)
        return None

    # Into what comes before

    def _backwards(self, norm: Norm) -> None:
        sources = {self._source(call): None for call in self._calls[norm.module]}
        modules = {_linear(source): source.name for source in sources}
        for module, path in modules.items():
            self._check_all(module, path, norm, spatial=_spatial(module))
            if channels_given(module) != norm.affine.channels:
                raise UnfitError(f"{path} before it gives another number of channels")
            if not all(self._leads_to(call, norm) for call in self._calls[module]):
                raise UnfitError(f"{path} before it is called for something else too")
        for module, path in modules.items():
            target = self._target(module, path)
            target.given, target.last = target.given.then(norm.affine), norm.path
        self._fold(norm, modules, norm.rest)

    def _source(self, call: Node) -> Node:
        """The linear module's call whose output a norm takes, and nobody else."""
        node = call.source
        while node is not None and (node.inputs or node.module is not None):
            if not node.is_linear and not self._passes(node):
                raise UnfitError(f"it follows {node.name}")
            if node.users > 1:
                raise UnfitError(f"something else takes what {node.name} before it gives")
            if node.is_linear:
                return node
            node = node.source
        raise UnfitError("it follows no layer")

    def _leads_to(self, call: Node, norm: Norm) -> bool:
        """Whether a linear module's output goes to a norm alone."""
        node = call
        while len(self._consumers[node]) == 1:
            given, (node,) = node, self._consumers[node]
            if node.module is norm.module:
                return node.source is given  # and not as its residual
            if not self._passes(node):
                return False
        return False

    # Into what comes behind

    def _forwards(self, norm: Norm) -> None:
        if not norm.vanishes:
            raise UnfitError("it ends in more than the normalization")
        found = [each for call in self._calls[norm.module] for each in self._takers(call, norm)]
        if not found:
            raise UnfitError("nothing takes what it gives")
        modules = {_linear(node): node.name for node, _ in found}
        affines: dict[Linear, Affine] = {}
        for node, is_flat in found:
            module = _linear(node)
            affines[module] = self._fitted(module, node.name, norm, is_flat)
        for module, affine in affines.items():
            target = self._target(module, modules[module])
            target.taken = affine.then(target.taken)
        self._fold(norm, modules, nn.Identity().train(norm.module.training))

    def _takers(self, call: Node, norm: Norm) -> Iterator[tuple[Node, bool]]:
        """The linear modules' calls that take what a norm's call gives, and whether flattened."""
        if len(call.inputs) != 1:
            raise UnfitError("it is given more than its input")
        ahead = [(call, False)]
        while ahead:
            node, is_flat = ahead.pop()
            for consumer in self._consumers[node]:
                if consumer.is_linear and len(consumer.inputs) == 1:
                    yield consumer, is_flat
                elif self._passes(consumer):
                    ahead.append((consumer, is_flat))
                elif consumer.effect == "flatten" and not is_flat:
                    ahead.append((consumer, True))
                else:
                    raise UnfitError(f"it feeds {consumer.name}")

    def _fitted(self, module: Linear, path: str, norm: Norm, is_flat: bool) -> Affine:
        """The norm as what a module behind it is to do to its input."""
        spatial = None if is_flat else _spatial(module)
        self._check_all(module, path, norm, spatial)
        if has_own_forward(module):
            raise UnfitError(f"{path} behind it has a forward of its own")
        if not norm.affine.only_scales and not _keeps_constants(module):
            raise UnfitError(f"{path} behind it pads, and a shift is another there")
        if not all(self._comes_from(call, norm) for call in self._calls[module]):
            raise UnfitError(f"{path} behind it is called for something else too")
        times, left = divmod(channels_taken(module), norm.affine.channels)
        if left or (times != 1 and not is_flat):
            raise UnfitError(f"{path} behind it takes another number of channels")
        return norm.affine.repeated(times)

    def _comes_from(self, call: Node, norm: Norm) -> bool:
        """Whether a linear module is called with what a norm gives."""
        node = call.source
        while node is not None and node.module is not norm.module:
            if not self._passes(node) and node.effect != "flatten":
                return False
            node = node.source
        return node is not None

    # Both

    def _check_all(self, module: Linear, path: str, norm: Norm, spatial: int | None) -> None:
        """Raise `UnfitError` where a module fits a norm in no direction."""
        if module in self._unfit:
            raise UnfitError(f"{path}: {self._unfit[module]}")
        ndims = self._ndims.get(norm.module)
        if not ndims:
            raise UnfitError("the example does not reach it")
        if spatial is not None and ndims - {spatial + 2}:
            raise UnfitError(f"{path} has its channels along another dimension than the norm")

    def _passes(self, node: Node) -> bool:
        """Whether an operation gives what it is given, once the plan is carried out."""
        return node.effect == "nothing" or (node.module in self._gone and len(node.inputs) == 1)

    def _target(self, module: Linear, path: str) -> Target:
        if module not in self._plan.targets:
            taken, given = channels_taken(module), channels_given(module)
            new = Target(path, Affine.identity(taken), Affine.identity(given), path)
            self._plan.targets[module] = new
        return self._plan.targets[module]

    def _fold(self, norm: Norm, into: Mapping[Linear, str], rest: nn.Module) -> None:
        self._plan.folded[norm] = tuple(into.values())
        self._plan.rests[norm] = rest
        if norm.vanishes:
            self._gone.add(norm.module)


def _linear(node: Node) -> Linear:
    assert isinstance(node.module, Linear)
    return node.module


def _spatial(module: Linear) -> int:
    return 0 if isinstance(module, nn.Linear) else len(module.kernel_size)


def _keeps_constants(module: Linear) -> bool:
    """Whether a constant input gives a constant output, the border included."""
    if isinstance(module, nn.Linear):
        return True
    reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    if isinstance(module, Transposed):  # where a stride leaves gaps, or kernels overlap, it varies
        sizes = (*module.padding, *module.output_padding, *reach)
        return not any(sizes) and {*module.stride, *module.dilation} == {1}
    if module.padding_mode != "zeros" or module.padding == "valid":
        return True
    return not any(reach if module.padding == "same" else module.padding)
