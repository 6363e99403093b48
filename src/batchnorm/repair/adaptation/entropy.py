"""γ and β learn at inference, without labels: towards answers that are sure of themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from batchnorm.models.calling import output_of

__all__ = ["Entropy", "EntropyMinimization", "Progress", "mean_entropy"]


@dataclass(frozen=True)
class Entropy:
    """How to minimize the entropy of a classifier's answers (Wang et al. 2021, section 3).

    - `optimizer`, `lr`: called as `optimizer(parameters, lr=lr)`.
    - `steps`: updates for each batch.
    - `cap`: how far an element of γ or β may go from where it was, in root mean squares of its
      layer's γ.
    - `collapse`, `window`: γ and β go back to where they were when more than that part of the
      last so many samples was taken for one class. The entropy is least for a network that always
      gives the same answer.
    - `logits`: what of the model's output holds them, (n, classes, *positions); None: its first
      tensor.

    Raises `ValueError` for numbers out of range.
    """

    lr: float = 1e-3
    steps: int = 1
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam
    cap: int | float = 0.5
    collapse: float = 0.9
    window: int = 128
    logits: Callable[[Any], Tensor] | None = None

    def __post_init__(self) -> None:
        for name, least in (("lr", 0), ("steps", 1), ("cap", 0), ("window", 1)):
            if not getattr(self, name) >= least:
                raise ValueError(f"Entropy needs {name} >= {least}, got {getattr(self, name)}")
        if not 0 < self.collapse <= 1:
            raise ValueError(
                f"Entropy needs 0 < collapse <= 1, a part of the samples, got {self.collapse}"
            )


class Progress(NamedTuple):
    """What entropy minimization has come to.

    - `batches`: those learned from; `undone`: those that were not, for something was not finite.
    - `collapses`: how often γ and β went back because the answers had become one class.
    - `before`, `after`: the mean entropy of a batch's answers in its first and its last step.
    - `capped`: the part of γ's and β's elements in which the cap held, in the last step.
    """

    batches: int = 0
    undone: int = 0
    collapses: int = 0
    before: float = 0.0
    after: float = 0.0
    capped: float = 0.0


class EntropyMinimization:
    """The γ and β of some layers, where they came from, and the optimizer that moves them.

    - `fewest`: samples that a batch must have to be learned from.
    """

    progress: Progress

    def __init__(
        self, model: nn.Module, layers: Iterable[nn.Module], settings: Entropy, fewest: int = 1
    ) -> None:
        self._model, self._settings, self._fewest = model, settings, fewest
        self._limits: dict[nn.Parameter, float] = {}
        for layer in layers:
            gamma = getattr(layer, "weight", None)
            scale = 1.0 if gamma is None else float(gamma.detach().square().mean().sqrt())
            for parameter in (gamma, getattr(layer, "bias", None)):
                if isinstance(parameter, nn.Parameter):
                    self._limits.setdefault(parameter, settings.cap * scale)
        if not self._limits:
            raise ValueError(
                "entropy minimization moves γ and β, and the adapted layers have none; adapt "
                "their statistics alone, without entropy="
            )
        self._source = {p: p.detach().clone() for p in self._limits}
        self._start()
        self.progress = Progress()

    def reset(self) -> None:
        """Give γ and β back what they were, to the bit; forget the optimizer's state."""
        _put(self._source)
        self._start()
        self.progress = Progress()

    def learn(self, run: Callable[[], Any]) -> Any:
        """What the model answers to a batch, from which γ and β have then learned.

        - `run`: calls the model with it.
        """
        saved = self._saved()
        try:
            with _only_these_learn(self._model, self._limits):
                return self._learn(run, saved)
        except BaseException:
            self._restore(saved)
            raise

    def _start(self) -> None:
        self._optimizer = self._settings.optimizer(list(self._limits), lr=self._settings.lr)
        self._predicted: Float[Tensor, " classes"] | None = None  # lately, as numbers of samples

    def _learn(self, run: Callable[[], Any], saved: _Saved) -> Any:
        progress, parameters = saved.progress, list(self._limits)
        entropies = []
        for _ in range(self._settings.steps):
            answers = run()
            logits = self._logits(answers)
            entropy = mean_entropy(logits)
            gradients = torch.autograd.grad(entropy, parameters, allow_unused=True)
            known = [g for g in gradients if g is not None]
            if not all(bool(t.isfinite().all()) for t in (entropy.detach(), *known)):
                self._restore(saved)
                self.progress = progress._replace(undone=progress.undone + 1)
                return answers
            entropies.append(float(entropy.detach()))
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            self._optimizer.step()
            capped = self._hold()
        self.progress = progress._replace(
            batches=progress.batches + 1, before=entropies[0], after=entropies[-1], capped=capped
        )
        if not self._has_collapsed(logits.detach()):
            return answers
        _put(self._source)
        self._start()
        self.progress = self.progress._replace(collapses=progress.collapses + 1)
        return run()

    def _logits(self, answers: Any) -> Float[Tensor, "n classes *positions"]:
        find = self._settings.logits or output_of
        logits = find(answers)
        if logits is None or logits.ndim < 2 or logits.shape[1] < 2:
            shape = None if logits is None else tuple(logits.shape)
            raise ValueError(
                "entropy minimization needs logits of shape (n, classes, *positions) with at "
                f"least 2 classes, got {shape}; say where they are with Entropy(logits=...)"
            )
        if len(logits) < self._fewest:
            raise ValueError(
                f"entropy minimization needs at least {self._fewest} samples in a batch, got "
                f"{len(logits)}: one alone has no companions to be normalized with. Give it "
                "larger batches, or remember the stream with adapt(..., memory=...)"
            )
        if not logits.requires_grad:
            raise ValueError(
                "the logits carry no gradient of γ and β: the model detaches them, or runs under "
                "torch.no_grad() inside"
            )
        return logits

    @torch.no_grad()
    def _hold(self) -> float:
        """Take γ and β back to where the cap lets them be; for what part of them that was."""
        held = total = 0
        for parameter, limit in self._limits.items():
            source = self._source[parameter]
            free = parameter.clone()
            parameter.copy_(torch.clamp(free, source - limit, source + limit))
            held, total = held + int((parameter != free).sum()), total + parameter.numel()
        return held / total

    def _has_collapsed(self, logits: Float[Tensor, "n classes *positions"]) -> bool:
        """Whether most of the last samples were taken for one class; remembers these."""
        classes, window = logits.shape[1], self._settings.window
        taken = torch.bincount(logits.argmax(1).flatten(), minlength=classes).double()
        taken *= len(logits) / taken.sum()  # samples, not positions
        if self._predicted is not None:
            seen = float(self._predicted.sum())
            taken += self._predicted * (min(max(window - len(logits), 0) / seen, 1))
        self._predicted = taken
        seen = float(taken.sum())
        return seen > window - 0.5 and float(taken.max()) > self._settings.collapse * seen

    def _saved(self) -> _Saved:
        values = {p: p.detach().clone() for p in self._limits}
        optimizer = copy.deepcopy(self._optimizer.state_dict())
        return _Saved(values, optimizer, self._predicted, self.progress)

    def _restore(self, saved: _Saved) -> None:
        _put(saved.values)
        self._start()
        self._optimizer.load_state_dict(saved.optimizer)
        self._predicted, self.progress = saved.predicted, saved.progress


class _Saved(NamedTuple):
    values: dict[nn.Parameter, Tensor]
    optimizer: dict[str, Any]
    predicted: Tensor | None
    progress: Progress


def mean_entropy(logits: Float[Tensor, "n classes *positions"]) -> Float[Tensor, ""]:
    """−Σ p·log p of the softmax over the classes, in nats; the mean over samples and positions."""
    log = logits.float().log_softmax(1) if logits.dtype.itemsize < 4 else logits.log_softmax(1)
    return -(log.exp() * log).sum(1).mean()


@contextmanager
def _only_these_learn(model: nn.Module, these: Iterable[nn.Parameter]) -> Iterator[None]:
    """Autograd follows these parameters alone; what learns and all gradients are put back."""
    chosen = set(these)
    every = {*model.parameters(), *chosen}
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in every]
    try:
        for parameter in every:
            parameter.requires_grad_(parameter in chosen)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter, learns, gradient in before:
            parameter.requires_grad_(learns)
            parameter.grad = gradient


@torch.no_grad()
def _put(values: dict[nn.Parameter, Tensor]) -> None:
    for parameter, value in values.items():
        parameter.copy_(value)
