"""Fold batch norms into the convolutions and linear layers before them, and behind them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from batchnorm.models.calling import Forward, call, tensors_of
from batchnorm.models.comparison import difference
from batchnorm.models.comparison import tolerance as default_tolerance
from batchnorm.models.compiled import original
from batchnorm.models.norms import Where, is_meant, is_norm
from batchnorm.models.snapshot import left_as_it_was
from batchnorm.repair.folding.change import Change
from batchnorm.repair.folding.fitness import uses_batch
from batchnorm.repair.folding.plan import Plan
from batchnorm.repair.folding.survey import survey
from batchnorm.repair.folding.trial import Trial
from batchnorm.repair.table import counted, table

__all__ = ["Folding", "fold"]


def fold(
    model: nn.Module,
    example: Any,
    *,
    forward: Forward | None = None,
    where: Where = None,
    tolerance: float | None = None,
    repeats: int = 5,
) -> Folding:
    """Let batch norms vanish into the convolutions and linear layers next to them, in place.

    With running statistics a batch norm is a constant map, y = s·x + t per channel, where
    s = γ/√(var + ε) and t = β − mean·s. Behind a convolution W∗x + b it becomes (s·W)∗x + s·b + t;
    before one, W·s and b + Σ W·t.

    ```python
    model.eval()
    folding = fold(model, images)          # images: (n, 3, h, w), as the model is given them
    folding                                # what went where, what stayed and why, how fast it is
    folding.undo()                         # the model that it was
    ```

    A batch norm goes into what comes before it if that is a convolution, a transposed one or a
    linear layer, of any groups, with or without a bias; through identities and dropout; into each
    of several, and with another batch norm between. What is left goes into what comes behind it
    if that gives the same at its border, too: without padding of zeros, or where t is 0. Who
    takes whose output is read off the model's graph, not off the order of its modules. Of this
    library's layers the activation, `residual=` and `mask=` stay, as a `FoldedBatchNorm`;
    others become `torch.nn.Identity`. Batch norms stay where folding would not be exact:
    see `Folding.refused`. Only what the example reaches is known and folded.

    The arithmetic is float64, rounded once. The model then answers the example before and after,
    and is left alone if that differs. Its parameters are new ones: optimizers made before hold
    the old.

    - `model`: in eval mode.
    - `example`: a batch as the model is given; see `forward`.
    - `forward(model, example)`: how to call the model; by default with a tensor, the first entry
      of a tuple, or a dictionary by name.
    - `where`: which batch norms, by path; all.
    - `tolerance`: the largest max |after − before| / max |before| of any tensor in the output; by
      default 1e-5, or ten times the resolution of a half-precision dtype.
    - `repeats`: how often it is timed before and after, in turn; 0: not.

    Returns what was done; see `Folding`.

    Raises `ValueError` for a model in training mode, without an order that can be read, that is
    lazy or on the meta device, for a `where` that names nothing, and for answers that hold NaN
    before; `ArithmeticError` where the answers differ by more than the tolerance; and what the
    model raises. The model is then what it was.

    Source: Jacob et al. 2018, "Quantization and training of neural networks for efficient
    integer-arithmetic-only inference", section 3.2 (behind a convolution).
    """
    model = original(model)
    norms = _meant(model, where)
    _check(model, norms, tolerance, repeats)
    trial = Trial(model, example, forward or call)
    with left_as_it_was(model):
        plan, change = survey(model, norms, trial, example, forward)
        off = _verified(trial, model, plan, change, tolerance) if plan.folded else 0.0
        before, after = trial.times(change, repeats if plan.folded else 0)
    size = _size(model)
    change.make()
    return Folding(
        folded={norm.path: into for norm, into in plan.folded.items()},
        refused=plan.refused,
        difference=off,
        seconds_before=statistics.median(before) if before else None,
        seconds_after=statistics.median(after) if after else None,
        parameters_saved=size - _size(model),
        _change=change,
    )


@dataclass(frozen=True, eq=False)
class Folding:
    """What `fold` did.

    - `folded`: the batch norms that went, and the modules that each went into.
    - `refused`: those that stayed, and why.
    - `difference`: the largest of max |after − before| / max |before| over the output's tensors.
    - `seconds_before`, `seconds_after`: of a pass of the example, medians; None if not timed.
    - `parameters_saved`: how many numbers the model has learned less.
    """

    folded: dict[str, tuple[str, ...]]
    refused: dict[str, str]
    difference: float
    seconds_before: float | None
    seconds_after: float | None
    parameters_saved: int
    _change: Change = field(repr=False)

    @property
    def speedup(self) -> float | None:
        """The time before over the time after."""
        if self.seconds_before is None or self.seconds_after is None:
            return None
        return self.seconds_before / self.seconds_after

    def undo(self) -> None:
        """Make the model what it was, with the parameters and layers that it had.

        Raises `ValueError` where other parameters or layers have taken the place of the new ones.
        """
        self._change.undo()

    def __repr__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        total = len(self.folded) + len(self.refused)
        title = f"Folding: {len(self.folded)} of {counted(total, 'batch norm')}"
        if self.folded:
            title += f", outputs differ by {self.difference:.1e}"
        if self.seconds_before is not None and self.seconds_after is not None:
            times = f"{self.seconds_before * 1e3:.1f} to {self.seconds_after * 1e3:.1f} ms"
            title += f", {times} (×{self.speedup:.2f})"
        if self.parameters_saved:
            title += f", {self.parameters_saved:,} parameters fewer"
        rows = [(path, ", ".join(into)) for path, into in self.folded.items()]
        yield table(title, ("batch norm", "folded into"), rows)
        if self.refused:
            yield table("Not folded:", ("batch norm", "why"), list(self.refused.items()))


def _meant(model: nn.Module, where: Where) -> dict[str, nn.Module]:
    norms = {path: module for path, module in model.named_modules() if is_norm(module)}
    meant = {path: norm for path, norm in norms.items() if is_meant(path, norm, where)}
    if norms and not meant:
        raise ValueError(
            f"where={where!r} names none of the {len(norms)} batch norms, such as "
            f"{next(iter(norms))!r}"
        )
    return meant


def _check(
    model: nn.Module, norms: dict[str, nn.Module], tolerance: float | None, repeats: int
) -> None:
    """Raise for what cannot be tried."""
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"tolerance is a relative difference, such as 1e-5, got {tolerance}")
    if repeats < 0:
        raise ValueError(f"repeats is how often to time a pass, got {repeats}")
    learning = [path for path, norm in norms.items() if uses_batch(norm)]
    if model.training and learning:
        raise ValueError(
            f"the model is in training mode, where {learning[0]!r} normalizes with the batch; "
            "call model.eval() first"
        )
    for path, module in model.named_modules():
        if isinstance(module, LazyModuleMixin):
            raise ValueError(f"{path!r} does not know its shape yet; call the model once before")
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("the model is on the meta device and has no values to fold; load them")


def _verified(
    trial: Trial, model: nn.Module, plan: Plan, change: Change, tolerance: float | None
) -> float:
    """By how much the model answers otherwise; raise where that is too much."""
    before = trial.outputs()
    if not before:
        raise ValueError("the model gives no tensors to compare; pass forward= that returns some")
    if any(bool(tensor.isnan().any()) for tensor in before):
        raise ValueError("the model answers the example with NaN, before anything is folded")
    with change.made():
        off = difference(trial.outputs(), before)
    if tolerance is None:
        tolerance = default_tolerance([*model.parameters(), *before])
    if off <= tolerance:
        return off
    where, there = _first_difference(trial, model, plan, change, tolerance)
    raise ArithmeticError(
        f"folded, the model's answers differ by {off:.1e}, relative to the largest, and "
        f"{tolerance:g} is allowed; it begins at {where!r}, by {there:.1e}. Leave that out with "
        "where=, or allow more with tolerance=; the model is what it was"
    )


def _first_difference(
    trial: Trial, model: nn.Module, plan: Plan, change: Change, tolerance: float
) -> tuple[str, float]:
    """Where layers begin to give something else than before, or give the most other."""
    paths = list(dict.fromkeys(target.last for target in plan.targets.values()))

    def given() -> dict[str, list[Tensor]]:
        names = {model.get_submodule(path): path for path in paths}
        found: dict[str, list[Tensor]] = {}
        for module, each in trial.calls(names):
            found.setdefault(names[module], []).extend(tensors_of(each.output))
        return found

    before = given()
    with change.made():
        after = given()
    differences = [(path, difference(after.get(path, []), old)) for path, old in before.items()]
    first = next((each for each in differences if each[1] > tolerance), None)
    return first or max(differences, key=lambda each: each[1])


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
