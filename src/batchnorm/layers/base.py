"""The one implementation behind BatchNorm1d, BatchNorm2d and BatchNorm3d."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm.functional import is_traced, track
from batchnorm.kernels import IDENTITY, Activation
from batchnorm.moments import Moments
from batchnorm.statistics import Batch, Running, RunningStatistics, Statistics, Untracked

__all__ = ["BatchNorm", "checked_statistics", "learning", "let_learn"]

_Layer = TypeVar("_Layer", bound="BatchNorm")

_WIDE_BUFFERS = ("running_mean", "running_var")


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalization of dimension 1, a drop-in for `torch.nn`'s.

    y = act(γ·(x − mean)/√(var + ε) + β + residual)

    In training, mean and (biased) variance are those that the statistics policy names, by
    default the batch's own, and the running statistics move towards the batch's mean and
    unbiased variance: running ← (1 − momentum)·running + momentum·batch. In eval they are the
    running ones.

    Beyond `torch.nn`, the running statistics stay float32 under `.half()` and `.bfloat16()`, a
    batch with a non-finite mean or variance leaves them and the counter alone, and the
    recomputation of an activation checkpoint does not count a batch twice.

    - `num_features`: channels, c.
    - `eps`: ε, added to the variance; positive in training.
    - `momentum`: the share of a new batch in the running statistics (PyTorch's sense); None
      for the average of all batches.
    - `affine`, `bias`: whether there is a γ (`weight`), and with it a β (`bias`).
    - `track_running_stats`: whether running statistics are kept; without them eval uses the
      batch's own.
    - `act`: an activation to fuse: "relu", "leaky_relu", "elu", "silu", "gelu", "gelu_tanh",
      "hardswish", "sigmoid", "tanh", a `torch.nn` module of these, or None.
    - `statistics`: whose statistics to use in training: `Batch()`, `Ghost(size)`, `Renorm()`,
      `Running()`, `Untracked(policy)`, `Sync()` over the ranks of torch.distributed.

    Raises `ValueError` for an unknown `act` and for a policy that reads running statistics
    where none are tracked.

    Source: Ioffe & Szegedy 2015, "Batch normalization", algorithms 1 and 2.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        act: str | nn.Module | Activation | None = None,
        statistics: Statistics | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if affine and not bias:
            self.register_parameter("bias", None)
        self._keep_statistics_wide()
        self.act = Activation.of(act)
        self.statistics = checked_statistics(statistics, track_running_stats)
        self._thawed: tuple[Statistics, dict[str, bool]] | None = None

    def forward(
        self,
        input: Float[Tensor, "n c *positions"],
        *,
        residual: Float[Tensor, "n c *positions"] | None = None,
        mask: Bool[Tensor, "n *positions"] | None = None,
    ) -> Float[Tensor, "n c *positions"]:
        """Normalize `input`, add `residual`, apply `act`.

        - `residual`: added before the activation.
        - `mask`: true where the data is; masked elements do not count and come out as zeros. A
          mask that leaves fewer than two values has no variance: the batch is not tracked.

        Raises `ValueError` for a wrong number of dimensions or channels, for shapes that do not
        fit, for eps ≤ 0 in training, and where training leaves one value per channel.
        """
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        policy, weight, bias, running = self._policy(), self.weight, self.bias, self._running()
        if not is_traced():
            self._check_channels(input, weight, bias, *(running or ())[:2])
            self._check_has_variance(input, policy)
        y, moments = policy.normalize(
            input,
            weight,
            bias,
            running,
            residual=residual,
            mask=mask,
            eps=self.eps,
            act=self.act,
        )
        if moments is not None and running is not None and self._tracks():
            self._track(running, moments, input)
        return y

    def freeze(
        self: _Layer,
        *,
        statistics: Literal["running", "batch"] = "running",
        updates: bool = False,
        learns: bool = False,
    ) -> _Layer:
        """Use the running statistics from now on, in training too, and stop learning γ and β.

        Unlike `eval()`, it survives `model.train()`, copying and pickling. Called again, it sets
        the three switches anew. Returns the layer; see `unfreeze`.

        - `statistics`: whose are used in training, the "running" ones or the "batch"'s, as the
          layer's policy takes them.
        - `updates`: whether the running ones still move towards the batch's.
        - `learns`: whether γ and β learn where they did; if not, they have no gradient.

        Raises `ValueError` where no running statistics are tracked that are to be used, and for
        other `statistics`.
        """
        policy, grads = self._thawed or (self.statistics, learning(self))
        switched = _switched(policy, statistics, updates)
        self.statistics = checked_statistics(switched, self.running_mean is not None)
        self._thawed = (policy, grads)
        let_learn(self, grads, learns)
        return self

    def unfreeze(self: _Layer) -> _Layer:
        """Undo `freeze`: the former policy, and γ and β learn where they did before."""
        if self._thawed is not None:
            self.statistics, grads = self._thawed
            let_learn(self, grads, True)
            self._thawed = None
        return self

    def extra_repr(self) -> str:
        """`torch.nn`'s, and what was asked beyond it."""
        beyond = ""
        if self.act != IDENTITY:
            beyond += f", act={self.act}"
        if self.statistics != Batch():
            beyond += f", statistics={self.statistics}"
        usual: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return usual + beyond

    def _policy(self) -> Statistics:
        """Whose statistics: the policy's in training, the running ones in eval if there are."""
        if self.training:
            return self.statistics.of(self)
        return Batch() if self.running_mean is None else Running()

    def _running(self) -> RunningStatistics | None:
        buffers = self._buffers  # attributes of a module take a detour
        mean, var = buffers.get("running_mean"), buffers.get("running_var")
        count = buffers.get("num_batches_tracked")
        return None if mean is None or var is None else RunningStatistics(mean, var, count)

    def _tracks(self) -> bool:
        return self.training and self.track_running_stats and not _is_recomputation()

    def _track(self, running: RunningStatistics, moments: Moments, input: Tensor) -> None:
        """Move the running statistics towards a batch's, without waiting for its values."""
        try:
            track(*running, moments, self.momentum)  # which leaves them where nothing was seen
            if input.numel() == 0 and running.batches is not None:  # torch.nn counts it
                running.batches.add_((moments.count == 0).any())
        except RuntimeError as error:
            raise _explained(error, self) from error

    def _check_channels(self, input: Tensor, *held: Tensor | None) -> None:
        """As torch.nn, by the tensors there are and not by num_features, which pruning leaves."""
        for tensor in held:
            if tensor is not None and tensor.shape[0] != input.shape[1]:
                raise ValueError(
                    f"{type(self).__name__}({self.num_features}) expects {tensor.shape[0]} "
                    f"channels in dimension 1, got input of shape {tuple(input.shape)}; channels "
                    "come second: set num_features, or permute the input"
                )

    def _check_has_variance(self, input: Tensor, policy: Statistics) -> None:
        n = input.shape[0]
        if policy.smallest_slice(n) * input.shape[2:].numel() == 1:
            slices = "" if n == 1 else ", whose last slice is one sample"
            # torch.nn's sentence first, for those who look for it
            raise ValueError(
                "Expected more than 1 value per channel when training, got input size "
                f"{tuple(input.shape)} with statistics={policy}{slices}: one value is its own "
                "mean, so its variance is 0 and every output would be β. Drop the odd last batch "
                "(DataLoader(..., drop_last=True)), use larger batches, call eval() if this is "
                "inference, or freeze() the layer"
            )

    def _keep_statistics_wide(self) -> None:
        """A momentum of 0.1 is lost in half precision: small steps round to nothing."""
        for name in _WIDE_BUFFERS:
            buffer = getattr(self, name)
            if _is_narrow(buffer):
                setattr(self, name, buffer.float())

    def _apply(self: _Layer, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Layer:
        before = {name: getattr(self, name) for name in _WIDE_BUFFERS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = getattr(self, name)
            if _is_narrow(new):
                setattr(self, name, old.to(new.device, torch.float32))  # not rounded on the way
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._keep_statistics_wide()


def checked_statistics(statistics: Statistics | None, tracked: bool) -> Statistics:
    """The policy, `Batch()` where None; raise if a layer that tracks or not cannot hold it."""
    if statistics is None:
        return Batch()
    if not isinstance(statistics, Statistics):
        raise TypeError(
            f"statistics must be a policy such as Batch() or Ghost(32), got {statistics!r}"
        )
    if statistics.needs_running and not tracked:
        statistics.required(None)
    return statistics


def learning(module: nn.Module) -> dict[str, bool]:
    """Which parameters of a module learn."""
    return {name: parameter.requires_grad for name, parameter in module.named_parameters()}


def let_learn(module: nn.Module, before: dict[str, bool], learns: bool) -> None:
    """Let the parameters learn that did before, or none.

    Never stops one in the first case: of layers that share one, the last to be frozen found it
    frozen already. In the second, gradients go too, which an optimizer would still step along.
    """
    for name, parameter in module.named_parameters():
        if not learns:
            parameter.requires_grad_(False).grad = None
        elif before.get(name, True):
            parameter.requires_grad_(True)


def _switched(policy: Statistics, statistics: str, updates: bool) -> Statistics:
    """A policy with other switches."""
    if statistics == "running":
        return Running(updates)
    if statistics != "batch":
        raise ValueError(
            f'freeze(statistics=...) must be "running" or "batch", got {statistics!r}: whose '
            "statistics to use in training"
        )
    policy = policy.policy if isinstance(policy, Untracked) else policy
    batch = Batch() if isinstance(policy, Running) else policy
    return batch if updates else Untracked(batch)


def _is_narrow(buffer: Tensor | None) -> bool:
    return buffer is not None and not is_lazy(buffer) and buffer.dtype.itemsize < 4


def _is_recomputation() -> bool:
    """Whether this forward runs inside a backward pass: a checkpoint computed again.

    A compiler traces a checkpointed region once and replays only what has no effects.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _explained(error: RuntimeError, layer: BatchNorm) -> RuntimeError:
    if not torch._C._are_functorch_transforms_active():
        return error
    return RuntimeError(
        f"{type(layer).__name__} in training mode updates its running statistics in place, which "
        f"the transform around it cannot do ({str(error).splitlines()[0]}). Call eval() or "
        "freeze(), construct it with track_running_stats=False, or pass its buffers through "
        "torch.func.functional_call, stacked where the transform is vmap"
    )
