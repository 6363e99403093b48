"""BN123: one layer, two distributions."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from batchnorm.audit.distance import Distance, between
from batchnorm.audit.evidence import Evidence, LayerEvidence, Origin
from batchnorm.audit.finding import Finding, Severity
from batchnorm.audit.layer_history import EVERY
from batchnorm.audit.noise import FEWEST
from batchnorm.audit.rule import Rule
from batchnorm.moments import Moments

__all__ = ["TwoDistributions"]


class TwoDistributions(Rule):
    """## What it finds

    Layers that are called from several places, or several times in a pass, and are given batches
    whose means lie more than half a standard deviation apart, or whose standard deviations differ
    by a factor of 1.5, beyond twice the sampling error. Being called twice alone is no finding.

    ## Why it hurts

    In training each call is normalized by its own batch, so that both come out standardized and
    what told them apart is gone. The running statistics average over both, fit neither, and at
    inference one of the two is shifted and stretched. Discriminators (real and generated images),
    domain adaptation, adversarial training (clean and perturbed) and shared heads live with it.

    ## Example

        loss = criterion(disc(real), 1) + criterion(disc(fake.detach()), 0)

    ## Fix

    `DomainBatchNorm(BatchNorm2d(c), ["real", "fake"])`: statistics of its own for each, γ and β
    shared. Or one call on both, `torch.cat([real, fake])`, which normalizes them together.

    ## When it is fine

    Where only one of them is ever evaluated and it has statistics of its own, or the layer is
    never used at inference, as most discriminators are.

    ## Evidence

    huggingface/pytorch-image-models#68, pytorch/pytorch#48929
    """

    code = "BN123"
    name = "one layer, two distributions"
    looks_at = "run, batches"

    def weigh(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for each layer, of the two origins that lie furthest apart."""
        for layer in evidence.layers:
            # without running statistics there is nothing that has to fit both
            worst = None if layer.is_averaged or layer.mixes_in_eval else _furthest(layer)
            if worst is None or layer.is_frozen:
                continue
            one, other, d = worst
            place = one if evidence.is_run else None
            who = f"{one} and {other}" if one != other else f"two calls at {one}"
            yield self.found(
                Severity.WARNING,
                f"{who} give it means {d.shift:.2g} ± {d.shift_error:.1g} standard "
                f"deviations apart, standard deviations ×{d.stretch_factor:.2g} apart",
                [layer.path],
                'DomainBatchNorm(layer, ["a", "b"]), or one call on torch.cat of both',
                place=place,
                shift=d.shift,
                shift_error=d.shift_error,
                stretch=d.stretch,
                stretch_error=d.stretch_error,
            )


def _furthest(layer: LayerEvidence) -> tuple[str, str, Distance] | None:
    """The two origins whose batches differ most, where that is harmful."""
    found = []
    for one, other in combinations(layer.origins, 2):
        first, second = _meanwhile(layer.origins[one], layer.origins[other])
        if min(len(first), len(second)) < FEWEST:
            continue
        d = between(first, second, layer.eps)
        if d.is_harmful:
            found.append((*_told_apart(one, other), d))
    return max(found, key=lambda each: each[2].shift + each[2].stretch, default=None)


def _meanwhile(one: Origin, other: Origin) -> tuple[list[Moments], list[Moments]]:
    """The batches of each that came while the other's did, and so under the same weights."""
    if not one.passes or not other.passes:
        return [], []
    start, end = max(one.passes[0], other.passes[0]), min(one.passes[-1], other.passes[-1])
    gap = 2 * EVERY  # the two take turns at being looked at

    def within(origin: Origin) -> list[Moments]:
        both = zip(origin.passes, origin.batches, strict=True)
        return [batch for number, batch in both if start - gap <= number <= end + gap]

    return within(one), within(other)


def _told_apart(one: str, other: str) -> tuple[str, str]:
    """Of two trails, the first lines that differ, or the line that makes both calls."""
    for a, b in zip(one.split(" > "), other.split(" > "), strict=False):
        if a != b:
            return a.partition("#")[0], b.partition("#")[0]
    a, b = (trail.rpartition(" > ")[2].partition("#")[0] for trail in (one, other))
    return a, b
