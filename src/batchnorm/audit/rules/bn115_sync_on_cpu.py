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

    In training mode it raises `SyncBatchNorm expected input tensor to be on GPU` and asks for a
    process group, and exporters refuse it. A configuration written for eight GPUs fails on a
    laptop, in a test, and at deployment.

    ## Example

        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)      # for training on 8 GPUs
        torch.onnx.export(model, …)                                 # on a laptop

    ## Fix

    `batchnorm.convert(model, to="batchnorm", example=batch)` for use on one machine; state dicts
    fit both ways.

    ## When it is fine

    In eval mode it computes what BatchNorm does. A model that is made on the CPU and moved to GPUs
    before it runs is fine too, and cannot be told from here.

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
                f"torch.nn.SyncBatchNorm on the CPU, where it cannot train, {in_layers(paths)}",
                paths,
                repair('convert(model, to="batchnorm", example=batch)', "the same state dict"),
                layers=float(len(paths)),
            )


def _is_sync_on_cpu(layer: LayerState) -> bool:
    if not isinstance(layer.module, nn.SyncBatchNorm):
        return False
    tensors = (*layer.module.parameters(False), *layer.module.buffers(False))
    return bool(tensors) and all(t.device.type == "cpu" for t in tensors)
