"""BN102: layers whose parameters are frozen and whose statistics are not."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.audit.call import policy_of
from batchnorm.audit.evidence import Evidence
from batchnorm.audit.finding import Finding, Severity, in_layers
from batchnorm.audit.rule import Rule, repair
from batchnorm.audit.state import LayerState, State

__all__ = ["HalfFrozen"]

_FIX = repair(
    "freeze(model, where=lambda _, norm: {p.requires_grad for p in norm.parameters()} == {False})"
)


class HalfFrozen(Rule):
    """## What it finds

    Layers in training mode whose γ and β get no gradient, so that somebody froze them, and whose
    running statistics still move with every batch.

    ## Why it hurts

    `requires_grad_(False)` freezes parameters. Running statistics are buffers, which a forward
    pass in training mode moves. A backbone frozen so drifts: it normalizes with the new data's
    batches, its statistics forget the data that its weights were trained on, and what was to
    stay as it was answers otherwise.

    ## Example

        backbone = resnet50(pretrained=True).requires_grad_(False)
        model.train()                       # the backbone's statistics move from now on

    ## Fix

    `batchnorm.freeze(backbone)`, which survives `model.train()`; or `backbone.eval()` after every
    `model.train()`.

    ## When it is fine

    When the statistics are meant to follow the new data under fixed weights
    (lightly-ai/lightly#1438 does so on purpose), and in a model that is put into `eval()` before
    it runs. `batchnorm check` sees a model as it was made, which is in training mode, and so
    calls it a fact; `batchnorm run` sees what became of it, and warns. A
    discriminator whose parameters are frozen while the generator learns is not reported in a
    run, since at other times they learn.

    ## Evidence

    Lightning-AI/pytorch-lightning#2551, Lightning-AI/pytorch-lightning#15062, pytorch/vision#2079
    """

    code = "BN102"
    name = "frozen parameters, moving statistics"
    looks_at = "model, run"

    def examine(self, state: State) -> Iterator[Finding]:
        """One finding for all layers."""
        paths = [layer.path for layer in state.layers if _is_half_frozen(layer)]
        if paths:
            yield self.found(
                Severity.INFO,
                f"γ and β frozen, running statistics moving in training, {in_layers(paths)}",
                paths,
                _FIX,
                layers=float(len(paths)),
            )

    def weigh(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for all layers that moved in a run and never had a gradient to get."""
        paths = [layer.path for layer in evidence.layers if not layer.learns]
        if paths and evidence.is_run:
            yield self.found(
                Severity.WARNING,
                f"γ and β frozen throughout, running statistics moving, {in_layers(paths)}",
                paths,
                _FIX,
                layers=float(len(paths)),
            )


def _is_half_frozen(layer: LayerState) -> bool:
    module = layer.module
    if module is None or not module.training or module.weight is None:
        return False
    policy = policy_of(module)
    if policy is not None and not policy.updates:
        return False
    learns = module.weight.requires_grad or (module.bias is not None and module.bias.requires_grad)
    tracks = module.track_running_stats and module.running_mean is not None
    return tracks and not learns and module.momentum != 0
