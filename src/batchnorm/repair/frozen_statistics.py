"""Forward passes that leave no trace in the running statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm.models.norms import has_usual_forward

__all__ = ["frozen_statistics", "obeys_flag"]

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Leave the running statistics of a model alone, whatever is called inside.

    ```python
    with frozen_statistics(teacher):            # in training mode: the batch's statistics are used
        target = teacher(images)

    @frozen_statistics(model)
    def shape_of_features(): ...
    ```

    Inside, every layer computes what it would, by the batch in training mode and by the running
    statistics in eval; afterwards running means, variances and counters hold the bits that they
    held before, also where the block raised. What was recorded inside can be differentiated
    afterwards. Blocks nest.

    It covers every module with statistics by their usual names. `torch.nn`'s batch norms and this
    library's move nothing while the block lasts. All others, instance norms and layers with a
    forward pass of their own, are lent copies, which move, and are taken from them at the end.

    A copy of the model that is made inside stays so: copy it before or after.

    Raises `ValueError` for layers that are lazy still, and for scripted ones, whose buffers
    cannot be lent; `TypeError` for what is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"frozen_statistics takes a torch.nn.Module, got {type(model).__name__}")
    flags: list[tuple[nn.Module, bool]] = []
    lent: list[tuple[nn.Module, str, Tensor]] = []
    for path, module in model.named_modules():
        buffers = module.named_buffers(recurse=False, remove_duplicate=False)
        own = [(name, buffer) for name, buffer in buffers if name in _STATISTICS]
        if not own:
            continue
        _check(path, module)
        if obeys_flag(module):
            # past a frozen layer's class, in which the flag reads as False
            flags.append((module, vars(module)["track_running_stats"]))
        else:
            lent += [(module, name, buffer) for name, buffer in own]
    try:
        for module, _ in flags:
            vars(module)["track_running_stats"] = False
        for module, name, buffer in lent:
            module._buffers[name] = buffer.clone()
        yield
    finally:
        for module, flag in flags:
            vars(module)["track_running_stats"] = flag
        for module, name, buffer in lent:
            module._buffers[name] = buffer


def obeys_flag(module: nn.Module) -> bool:
    """Whether a layer is known to move nothing, and compute the same, without its flag.

    Whoever wrote another forward pass may mean something else by `track_running_stats`, as
    instance norms do, which then use a sample's own statistics in eval too.
    """
    return has_usual_forward(module)


def _check(path: str, module: nn.Module) -> None:
    name = path or type(module).__name__
    if any(map(is_lazy, module.buffers(recurse=False))):
        raise ValueError(
            f"{name} is lazy and has no statistics to leave alone; give it its shape by a pass in "
            "eval mode, model.eval()(x), which moves none"
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(
            f"{name} is scripted, and its running statistics cannot be lent; put the model before "
            "torch.jit.script into the block, or call eval() on this one"
        )
