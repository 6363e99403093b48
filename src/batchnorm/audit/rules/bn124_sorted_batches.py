"""BN124: batches that are not alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from batchnorm.audit.evidence import Evidence
from batchnorm.audit.finding import Finding, Severity
from batchnorm.audit.rule import Rule

__all__ = ["SortedBatches", "likeness"]

SHUFFLES = 1999
SURE = 0.0005  # chance of a false alarm in each of two tests; with so many shuffles the least
AT_ONCE = 2**18  # numbers that are shuffled: 2 MB
HARMFUL = 2.0  # times the spread of batch means that shuffled samples would have


class SortedBatches(Rule):
    """## What it finds

    Batches whose means lie further apart than batches of shuffled samples would: samples arrive
    sorted by class, source or time. Coarse means of what the model is given, and the
    mean of each sample, are compared between batches and within them (one-way analysis of
    variance), and the same is done for samples shuffled over the batches, 1,999 times.

    ## Why it hurts

    Every batch is normalized by its own statistics. Where the composition of a batch tells the
    label, the network learns to read it off the statistics, and that is gone at inference: running
    statistics average over all batches and fit none. Contrastive methods have cheated so
    (HobbitLong/CMC#39).

    ## Example

        DataLoader(dataset, batch_size=64, shuffle=False)      # files sorted by class

    ## Fix

    `DataLoader(..., shuffle=True)`; where sources must stay apart, one layer a source
    (`DomainBatchNorm`), or a sampler that mixes them.

    ## When it is fine

    For batches that are groups by design (one patient, one speaker) and evaluated as such. An
    augmentation that is drawn once for a batch sets it apart too; draw it for each sample. In a
    run, a model that is called from several places is left to BN123.

    ## Evidence

    HobbitLong/CMC#39, facebookresearch/moco#46
    """

    code = "BN124"
    name = "batches that are not alike"
    looks_at = "run, batches"

    def weigh(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for each model, from what it was given."""
        if all(layer.is_frozen for layer in evidence.layers):
            return  # nothing is normalized by its batch
        for path, samples in evidence.samples.items():
            whole = [batch for batch in samples if len(batch) > 1]
            if len(whole) < 2:
                continue
            # a sample's mean over all of them knows little, and that exactly
            overall = [batch.mean(1, keepdim=True) for batch in whole]
            measured = max(likeness(whole), likeness(overall), key=lambda each: each.ratio)
            if measured.chance <= SURE and measured.ratio >= HARMFUL:
                yield self.found(
                    Severity.WARNING,
                    f"batch means lie {measured.ratio**0.5:.1f} times as far apart as those of "
                    f"shuffled samples would (of {SHUFFLES} shuffles {measured.as_far} were as "
                    "far)",
                    [path],
                    "DataLoader(..., shuffle=True); augmentation drawn for each sample",
                    ratio=measured.ratio,
                    chance=measured.chance,
                )


class Likeness(NamedTuple):
    """How far apart batches are.

    - `ratio`: variance between batches over variance within, as F is: 1 for shuffled samples.
    - `chance`: of a ratio as large if the samples were shuffled: an exact permutation test's.
    - `as_far`: shuffles that were.
    """

    ratio: float
    chance: float
    as_far: int


def likeness(batches: list[Float[Tensor, "_ c"]]) -> Likeness:
    """Compare batches of samples, (n, c) each with an n of its own, by analysis of variance.

    The statistic is Σ_c between_c / Σ_c within_c over channels that are scaled to variance one,
    each mean square over its degrees of freedom (Fisher 1925). Its distribution where batches
    are alike is that over shuffles, whatever the samples' distribution and the channels'
    correlation.
    """
    samples = torch.cat(batches).double()
    spread = samples.std(0)
    samples = (samples - samples.mean(0))[:, spread > 0] / spread[spread > 0]
    sizes = torch.tensor([len(batch) for batch in batches])
    n, k = len(samples), len(batches)
    total = samples.square().sum()
    if samples.numel() == 0 or n <= k:
        return Likeness(1.0, 1.0, SHUFFLES)
    members = torch.repeat_interleave(torch.arange(k), sizes)
    generator = torch.Generator().manual_seed(0)

    def ratios(orders: Int[Tensor, "s n"]) -> Float[Tensor, " s"]:
        rows = (members + k * torch.arange(len(orders))[:, None]).flatten()
        sums = torch.zeros(k * len(orders), samples.shape[1], dtype=samples.dtype)
        sums.index_add_(0, rows, samples[orders.flatten()])
        between = (sums.square().sum(1).view(-1, k) / sizes).sum(1)
        within = total - between
        return between / (k - 1) / (within / (n - k)).clamp(min=1e-300)

    observed = ratios(torch.arange(n)[None])
    left, as_far = SHUFFLES, 0
    while left:
        # many at once, where they are small: most of the time of one would be PyTorch's own
        some = min(left, max(1, AT_ONCE // samples.numel()))
        orders = [torch.randperm(n, generator=generator) for _ in range(some)]
        as_far += int((ratios(torch.stack(orders)) >= observed).sum())
        left -= some
    return Likeness(float(observed), (1 + as_far) / (1 + SHUFFLES), as_far)
