"""BN115: torch's SyncBatchNorm where it cannot run."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from batchnorm.audit.finding import Finding, Severity, in_layers
from batchnorm.audit.rule import Rule, repair
from batchnorm.audit.state import LayerState, State

__all__ = ["SyncOnCPU"]


class SyncOnCPU(Rule):
    """## What it finds

    Layers of `torch.nn.SyncBatchNorm` in a model on the CPU.

    ## Why it hurts

    Under torch.distributed it cannot train there: DistributedDataParallel refuses the model, and
    the layer says `SyncBatchNorm expected input tensor to be on GPU`. A configuration written for
    eight GPUs fails in a test and on a cluster of CPUs.

    ## Example

        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)      # for training on 8 GPUs
        DistributedDataParallel(model)                              # in a test, with gloo

    ## Fix

    `batchnorm.convert(model, to="batchnorm", example=batch)`: layers that share statistics over
    the same ranks as before, on CPUs with gloo as on GPUs, and are plain batch norm in a single
    process. State dicts fit both ways.

    ## When it is fine

    In eval mode, and in a process on its own, it computes what BatchNorm does. A model that is
    made on the CPU and moved to GPUs before it runs is fine too, and cannot be told from here.

    ## Evidence

    open-mmlab/mmocr#398, pytorch/pytorch#41081
    """

    code = "BN115"
    name = "SyncBatchNorm on the CPU"
    looks_at = "model"

    def examine(self, state: State) -> Iterator[Finding]:
        """One finding for all layers."""
        paths = [layer.path for layer in state.layers if _is_sync_on_cpu(layer)]
        if paths:
            yield self.found(
                Severity.WARNING,
                "torch.nn.SyncBatchNorm on the CPU, where ranks cannot train it, "
                f"{in_layers(paths)}",
                paths,
                repair('convert(model, to="batchnorm", example=batch)', "the same state dict"),
                layers=float(len(paths)),
            )


def _is_sync_on_cpu(layer: LayerState) -> bool:
    if not isinstance(layer.module, nn.SyncBatchNorm):
        return False
    tensors = (*layer.module.parameters(False), *layer.module.buffers(False))
    return bool(tensors) and all(t.device.type == "cpu" for t in tensors)
