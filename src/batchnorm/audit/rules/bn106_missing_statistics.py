"""BN106: trained weights without the statistics that belong to them."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.audit.finding import Finding, Severity, in_layers
from batchnorm.audit.rule import Rule, repair
from batchnorm.audit.state import State

__all__ = ["MissingStatistics"]


class MissingStatistics(Rule):
    """## What it finds

    Layers of a checkpoint that have a running mean without a running variance or the reverse, or
    a count of batches without both, and layers whose statistics are still exactly 0 and 1 while γ
    or β were trained.

    ## Why it hurts

    Running statistics are half of what a batch norm layer has learned. Tools that save parameters
    alone (`dict(model.named_parameters())`, adapters, averaged weights) lose them; loaded with
    `strict=False` the layer keeps 0 and 1, and inference normalizes by statistics that no data
    ever had.

    ## Example

        torch.save(dict(model.named_parameters()), "weights.pt")     # no buffers
        model.load_state_dict(torch.load("weights.pt"), strict=False)

    ## Fix

    Save `model.state_dict()`. Where the statistics are lost, estimate them again from training
    data: `batchnorm.recalibrate(model, loader)`.

    ## When it is fine

    A new model has 0 and 1 under γ and β that are equal in all channels, and is not reported. A
    missing `num_batches_tracked` is cosmetic (pytorch/pytorch#8430) unless momentum is None. Layers
    that are never evaluated with running statistics do not need them.

    ## Evidence

    huggingface/peft#1732, pytorch/nn#1165
    """

    code = "BN106"
    name = "weights without their statistics"
    looks_at = "checkpoint, model"

    def examine(self, state: State) -> Iterator[Finding]:
        """One finding for each missing key, one for all layers with 0 and 1."""
        untouched = []
        for layer in state.layers:
            has_mean, has_var = layer.running_mean is not None, layer.running_var is not None
            if layer.batches is not None and layer.module is None and not (has_mean or has_var):
                yield self.found(
                    Severity.ERROR,
                    "there is a count of batches, and neither a running_mean nor a running_var",
                    [layer.path],
                    "save model.state_dict(), whole",
                )
            if has_mean != has_var:
                there, missing = ("mean", "var") if has_mean else ("var", "mean")
                yield self.found(
                    Severity.ERROR,
                    f"there is a running_{there} and no running_{missing}",
                    [layer.path],
                    "save model.state_dict(), whole",
                )
            if layer.is_initial and layer.has_learned:
                untouched.append(layer.path)
        if untouched:
            yield self.found(
                Severity.WARNING,
                f"trained γ and β over statistics still exactly 0 and 1 {in_layers(untouched)}",
                untouched,
                repair("recalibrate(model, loader)", "before inference"),
                layers=float(len(untouched)),
            )
