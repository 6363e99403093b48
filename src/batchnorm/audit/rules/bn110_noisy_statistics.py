"""BN110: batch statistics too noisy to train with."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.audit.evidence import Evidence
from batchnorm.audit.finding import Finding, Severity, in_layers
from batchnorm.audit.noise import Noise, noise
from batchnorm.audit.rule import Rule, repair

__all__ = ["NoisyStatistics"]

LARGEST = 0.5  # of a standard deviation: that of six independent normal values per channel


class NoisyStatistics(Rule):
    """## What it finds

    Layers whose batch statistics differ so much from one batch to the next that they move each
    normalized value by more than half a standard deviation, beyond twice the error with which that
    is known. It is the noise of about six independent values per channel, √(1.5/6) = 0.5; the
    positions of one image count, but are not independent of each other. Layers that synchronize are
    judged by the batches of all their ranks together.

    ## Why it hurts

    What a sample becomes depends on which others it meets. Some of that regularizes; as much of it
    as of signal hides what is to be learned, and at inference it is gone, so that the network
    that is evaluated is another one. Wu & He 2018 ("Group normalization", section 4.1) measured an
    ImageNet error 1.2 points higher with 8 images per GPU than with 32, 3.7 with 4 and 11 with 2.

    ## Example

        DataLoader(dataset, batch_size=2)         # detection, segmentation, 3-D: memory ends here

    ## Fix

    Larger batches (`rematerialize(model)` frees memory for them), statistics over several ranks
    (`batchnorm.convert(model, to="sync")`), statistics corrected towards the running ones
    (`batchnorm.convert(model, to=Renorm())`), frozen ones when fine-tuning
    (`batchnorm.freeze(model)`), or `batchnorm.convert(model, to="group_norm")`.

    ## When it is fine

    Where noise is meant to regularize, as with ghost batches. Layers with the policy `Renorm`,
    which corrects the batch's statistics, are not reported. Batches that differ because they are
    sorted are as noisy; BN124 tells.

    ## Evidence

    YudeWang/deeplabv3plus-pytorch#39
    """

    code = "BN110"
    name = "batch statistics too noisy"
    looks_at = "run, batches"

    def weigh(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for all layers, the noisiest first."""
        found: dict[str, Noise] = {}
        for layer in evidence.layers:
            measured = noise(layer.alike, layer.eps)
            mixed = not (layer.is_frozen or layer.is_averaged or layer.is_corrected)
            if measured is None or not mixed:
                continue
            if measured.value - 2 * measured.error > LARGEST:
                found[layer.path] = measured
        if found:
            paths = sorted(found, key=lambda path: -found[path].value)
            worst = found[paths[0]]
            most = "" if len(paths) == 1 else "at most "
            yield self.found(
                Severity.WARNING,
                f"each batch's own statistics move an output by {most}{worst.value:.2g} ± "
                f"{worst.error:.1g} standard deviations, {in_layers(paths)}",
                paths,
                repair(
                    "convert(model, to=batchnorm.Renorm())",
                    "or rematerialize(model) and larger batches; freeze(model) when fine-tuning",
                ),
                noise=worst.value,
                error=worst.error,
                layers=float(len(paths)),
            )
