"""Adaptation to what a model is given at inference, which is not what it was trained with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm.models.calling import Forward, call, with_tensors
from batchnorm.models.compiled import is_compiled
from batchnorm.models.norms import TorchBatchNorm, Where, batch_norms, is_meant
from batchnorm.models.snapshot import undone_on_failure
from batchnorm.repair.adaptation.entropy import Entropy, EntropyMinimization, Progress
from batchnorm.repair.adaptation.statistics import (
    AdaptedLayer,
    Cap,
    CurrentStream,
    LayerDrift,
    Settings,
    is_adapted,
    trains,
)
from batchnorm.repair.table import shown, table

__all__ = ["Adaptation", "Cap", "Entropy", "LayerDrift", "adapt"]

_CAP = Cap()


def adapt(
    model: nn.Module,
    *,
    prior: int | float = 128,
    memory: int | float | None = 256,
    cap: Cap | None = _CAP,
    entropy: Entropy | None = None,
    forward: Forward | None = None,
    where: Where = None,
) -> Adaptation:
    """Let a model normalize with what it is given at inference, held to what it was trained with.

    mean = N/(N + n)·mean_s + n/(N + n)·mean_t,  var = N/(N + n)·var_s + n/(N + n)·var_t

    for each batch norm layer in eval mode: s is the source, its running statistics, t the target,
    the n samples that it remembers of the stream, the batch at hand included, and N the `prior`.
    The target's own variance is of all its samples, merged as moments. Across s and t two
    estimates of one variance are weighed, as in the paper; to pool them as moments too, with the
    distance of their means in the variance, changed nothing on corrupted digits in mixed order,
    and cost up to two points in sorted order.

    ```python
    adapt(model.eval())                                # from now on: model(images), as ever
    with adapt(model) as adaptation:                   # or for as long as this lasts
        model(images)
        adaptation                                     # how far each layer drifted, and the cap
        adaptation.reset()                             # another day
    with adaptation.stream("camera 1"):                # streams that know nothing of each other
        model(frame)                                   # (1, 3, h, w): one by one is enough
    adapt(model, memory=None)                          # each batch by itself
    answers = adapt(model, entropy=Entropy())(images)  # and γ and β learn
    ```

    Hooks move each layer's input and nothing else: without `entropy` the state_dict stays the same
    bits, whatever happens. A sample is what dimension 0 of a layer's input counts. In training mode
    nothing is adapted, be it frozen or not. A batch with a NaN or an infinity is normalized with
    what was known before it, and not remembered.

    With `memory` an answer depends on what came before. Where the classes come sorted, that is
    harmful: the statistics follow the class, the more the smaller `prior` and `memory` are. The
    defaults were chosen on corrupted digits (`benchmarks/adaptation.md`). Prior and memory are
    within two points of the best ones there in mixed and in sorted order, clean and corrupted. The
    cap lets a stream bear one broken frame in fifty, and costs accuracy where the shift is great:
    widen it where frames do not break. Clean images that come sorted are best not adapted to.

    - `prior`: N, for how many samples the running statistics stand; 0: the target alone,
      `math.inf`: the source to the bit.
    - `memory`: for how many samples the stream counts at most; older ones fade out as new ones
      come in. `math.inf`: none fade; None: only the batch at hand is seen.
    - `cap`: how far mean and standard deviation may be from the source's, those of a batch before
      it is remembered and those in use; None: any.
    - `entropy`: how γ and β learn too, towards sure answers, for which batches are given to the
      adaptation itself, `adaptation(batch)`; see `Entropy`.
    - `forward`: how `adaptation(batch)` calls the model; by default as trainers do.
    - `where`: which layers, by path.

    Returns the adaptation, whose `remove()` makes the model what it was.

    Raises `ValueError` where no layer has running statistics, or one has some that are lazy, meta
    or not finite, or is adapted already, and for numbers out of range; `TypeError` for what is no
    module, or compiled, whose layers' hooks would not be called.

    Source: Schneider et al. 2020, "Improving robustness against common corruptions by covariate
    shift adaptation", section 3, eq. 1; Wang et al. 2021, "Tent: fully test-time adaptation by
    entropy minimization", section 3.
    """
    settings = _settings(prior, memory, cap)
    if entropy is not None and not isinstance(entropy, Entropy):
        raise TypeError(f"entropy must be an Entropy, such as Entropy(), or None, got {entropy!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"adapt takes a torch.nn.Module, got {type(model).__name__}")
    layers = _adaptable(model, where)
    with undone_on_failure(model):
        return Adaptation(model, layers, settings, entropy, forward or call)


class Adaptation:
    """The hooks that `adapt` put on a model's layers, and what they remember.

    Leaving it as a context removes it.
    """

    def __init__(
        self,
        model: nn.Module,
        norms: dict[str, TorchBatchNorm],
        settings: Settings,
        entropy: Entropy | None,
        forward: Forward,
    ) -> None:
        self._model, self._norms, self._settings, self._forward = model, norms, settings, forward
        self._current = CurrentStream()
        self._adapted = [AdaptedLayer(path, settings, self._current) for path in norms]
        self._minimization = None
        if entropy is not None:
            fewest = 2 if settings.memory == 0 else 1
            self._minimization = EntropyMinimization(model, norms.values(), entropy, fewest)
        self._handles = [
            norm.register_forward_pre_hook(adapted, with_kwargs=True)
            for norm, adapted in zip(norms.values(), self._adapted, strict=True)
        ]

    def __call__(self, batch: Any) -> Any:
        """What the adapted model answers to a batch; with entropy, γ and β learn from it then.

        The answers come from the last pass before γ and β move for the last time, and carry no
        gradients where they moved. A batch that fails has not been: the stream, γ and β are what
        they were.

        Raises `ValueError` for layers in training mode, which normalize with the batch anyhow, or
        are frozen; with entropy also for logits that have none, and for a single sample without
        memory.
        """
        training = [path for path, norm in self._norms.items() if trains(norm)]
        if training:
            raise ValueError(
                f"adaptation is for inference, and {shown(training[0])!r} is in training mode, "
                f"with {len(training) - 1} others; call model.eval() first"
            )
        before = [adapted.state for adapted in self._adapted]

        def run() -> Any:
            self._put(before)  # of several passes the stream takes up one
            return self._forward(self._model, batch)

        try:
            if self._minimization is None:
                return run()
            with torch.inference_mode(False):
                batch = with_tensors(batch, _usable_by_autograd)
            return with_tensors(self._minimization.learn(run), Tensor.detach)
        except BaseException:
            self._put(before)
            raise

    @contextmanager
    def stream(self, name: str) -> Iterator[None]:
        """What this thread gives the model inside is of one stream, apart from all others.

        Raises `ValueError` with entropy: γ and β are the model's, and there is one of each.
        """
        if self._minimization is not None:
            raise ValueError(
                "γ and β learn from every batch, so that streams would not be apart; adapt a "
                "copy of the model for each: adapt(copy.deepcopy(model), entropy=...)"
            )
        before, self._current.name = self._current.name, name
        try:
            yield
        finally:
            self._current.name = before

    def reset(self, stream: str | None = None) -> None:
        """Forget a stream; or all, and give γ and β back what they were, to the bit."""
        for adapted in self._adapted:
            if stream is None:
                adapted.streams.clear()
            else:
                adapted.streams.pop(stream, None)
        if stream is None and self._minimization is not None:
            self._minimization.reset()

    def remove(self) -> None:
        """Take the hooks off and give γ and β back what they were: the model is the source's."""
        for handle in self._handles:
            handle.remove()
        if self._handles and self._minimization is not None:
            self._minimization.reset()
        self._handles = []

    @property
    def layers(self) -> tuple[LayerDrift, ...]:
        """How far each layer is from its running statistics, in the stream that is current."""
        return tuple(adapted.drift() for adapted in self._adapted)

    @property
    def streams(self) -> tuple[str, ...]:
        """The names of the streams that were met, "main" being what was given no name."""
        met = [name for adapted in self._adapted for name in list(adapted.streams)]
        return tuple(dict.fromkeys(met))

    @property
    def entropy(self) -> Progress | None:
        """What entropy minimization has come to; None without."""
        return None if self._minimization is None else self._minimization.progress

    def __enter__(self) -> Adaptation:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        layers, settings = self.layers, self._settings
        title = f"Adaptation: prior {settings.prior:g} samples"
        if settings.memory:
            title += f", memory {settings.memory:g} samples"
        if len(self.streams) > 1:
            title += f", {len(self.streams)} streams, here {self._current.name!r}"
        head = ("layer", "samples", "mean off", "std", "cap held", "skipped")
        rows = [
            (
                shown(layer.path),
                f"{layer.samples:,}",
                f"{layer.mean:.2g} σ",
                f"×{layer.std:.3g}",
                f"{layer.capped:.1%}",
                f"{layer.skipped:,}",
            )
            for layer in layers
        ]
        return "\n".join([table(title, head, rows), *_told(self.entropy)])

    def _put(self, states: list[Any]) -> None:
        for adapted, state in zip(self._adapted, states, strict=True):
            adapted.state = state


def _told(progress: Progress | None) -> Iterator[str]:
    if progress is not None:
        yield (
            f"entropy: {progress.before:.3g} to {progress.after:.3g} nats on the last of "
            f"{progress.batches:,} batches, cap held in {progress.capped:.1%} of γ and β, "
            f"{progress.undone:,} undone, {progress.collapses:,} collapses"
        )


def _settings(prior: int | float, memory: int | float | None, cap: Cap | None) -> Settings:
    for name, number in (("prior", prior), ("memory", 1 if memory is None else memory)):
        if not isinstance(number, (int, float)):
            raise TypeError(f"{name} must be a number of samples, got {number!r}")
    if cap is not None and not isinstance(cap, Cap):
        raise TypeError(f"cap must be a Cap, such as Cap(mean=1, std=2), or None, got {cap!r}")
    if not prior >= 0:
        raise ValueError(
            f"prior is a number of samples, from 0 (the batch alone) to math.inf (the running "
            f"statistics alone), got {prior}"
        )
    if memory is not None and not memory >= 1:
        raise ValueError(
            f"memory is a number of samples of a stream, at least 1, or None, got {memory}"
        )
    return Settings(float(prior), float(memory or 0), cap)


def _adaptable(model: nn.Module, where: Where) -> dict[str, TorchBatchNorm]:
    """The layers that have running statistics to start from."""
    for path, module in model.named_modules():
        if is_compiled(module) or getattr(module, "_compiled_call_impl", None) is not None:
            raise TypeError(
                f"{shown(path)} is compiled and would not call the hooks of its layers; "
                "adapt the model that was compiled, and call that"
            )
    norms = {path: norm for path, norm in batch_norms(model).items() if is_meant(path, norm, where)}
    found = {path: norm for path, norm in norms.items() if norm.running_mean is not None}
    if not found:
        among = f"none of {len(norms)} has any" if norms else f"where={where!r} names none"
        if not batch_norms(model):
            among = "the model has none; one that was folded has its statistics in its weights"
        raise ValueError(f"adapt needs batch norm layers with running statistics: {among}")
    for path, norm in found.items():
        _check_source(path, norm)
    return found


def _check_source(path: str, norm: TorchBatchNorm) -> None:
    statistics = [norm.running_mean, norm.running_var]
    if any(t is None or is_lazy(t) or t.is_meta for t in statistics):
        raise ValueError(
            f"{shown(path)!r} has no statistics yet: it is lazy or on the meta device; load its "
            "weights or run a batch through the model first"
        )
    if not all(bool(t.isfinite().all()) for t in statistics if t is not None):
        raise ValueError(
            f"{shown(path)!r} has running statistics that are not finite, from which nothing can "
            "be adapted; recalibrate(model, batches) first"
        )
    if is_adapted(norm):
        raise ValueError(f"{shown(path)!r} is adapted already; remove() that adaptation first")


def _usable_by_autograd(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor
