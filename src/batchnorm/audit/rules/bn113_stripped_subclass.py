"""BN113: subclasses of batch norm that a conversion would strip of what they do."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from batchnorm.audit.finding import Finding, Severity, in_layers
from batchnorm.audit.rule import Rule, repair
from batchnorm.audit.state import State
from batchnorm.layers import BatchNorm

__all__ = ["StrippedSubclass"]

_OWN = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d),
)


class StrippedSubclass(Rule):
    """## What it finds

    Layers of classes that somebody derived from torch.nn's batch norms: with a `forward` of their
    own, an activation inside, statistics that are computed otherwise.

    ## Why it hurts

    `SyncBatchNorm.convert_sync_batchnorm`, folding tools and exporters ask
    `isinstance(module, _BatchNorm)` and build a plain layer from its numbers. What the subclass
    did beyond is gone, without a word.

    ## Example

        class BatchNormAct2d(nn.BatchNorm2d):               # as timm has it
            def forward(self, x):
                return self.act(super().forward(x))
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)      # the activations are lost

    ## Fix

    Look at what such a tool made of the model before training it; convert the layers first to
    ones that say what they do, such as `BatchNorm2d(c, act="relu")` of this library.
    `batchnorm.convert(model, to="sync")` synchronizes without stripping: it keeps timm's
    activation, and leaves what it does not know as it is, with the reason.

    ## When it is fine

    As long as nobody converts the model. This library's own layers are not reported; its README
    names the tools that strip them.

    ## Evidence

    pytorch/pytorch#187298, pytorch/pytorch#187771
    """

    code = "BN113"
    name = "a subclass that conversions strip"
    looks_at = "model"

    def examine(self, state: State) -> Iterator[Finding]:
        """One finding for each class."""
        paths: dict[type, list[str]] = {}
        for layer in state.layers:
            kind = type(layer.module)
            if layer.module is not None and kind not in _OWN and not issubclass(kind, BatchNorm):
                paths.setdefault(kind, []).append(layer.path)
        for kind, layers in paths.items():
            own = " with a forward of its own" if _overrides_forward(kind) else ""
            name = f"{kind.__module__}.{kind.__qualname__}"
            yield self.found(
                Severity.INFO,
                f"{name}, a subclass of batch norm{own}, {in_layers(layers)}",
                layers,
                repair(
                    'convert(model, to="batchnorm")', "says which it would strip, and leaves them"
                ),
                layers=float(len(layers)),
            )


def _overrides_forward(kind: type) -> bool:
    return getattr(kind, "forward", None) is not nn.modules.batchnorm._BatchNorm.forward
