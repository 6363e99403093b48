"""BN126: deployment's data are far from training's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from batchnorm.audit.distance import distance
from batchnorm.audit.evidence import Evidence
from batchnorm.audit.finding import Finding, Severity
from batchnorm.audit.noise import FEWEST
from batchnorm.audit.profiling import running_distance
from batchnorm.audit.rule import Rule, repair

__all__ = ["OtherData"]


class OtherData(Rule):
    """## What it finds

    Layers that deployment's batches (`--deploy module:loader`, `audit(..., deploy=...)`) give
    something whose mean and variance are far from the running statistics, beyond twice the
    sampling error, while those of the training data are not (that would be BN103). The model is
    in eval mode, as it is where it is used.

    ## Why it hurts

    Inference standardizes by the training data's statistics. Data from another camera, scanner or
    season come out shifted and stretched, from the first layer on; the network works outside of
    what it was trained for, and loses accuracy without a sign of it.

    ## Example

        batchnorm check model.py:make --data data:training --deploy data:hospital_b

    ## Fix

    `batchnorm.adapt(model)`, which mixes the statistics of what comes in with the source's
    (Schneider et al. 2020, "Improving robustness against common corruptions by covariate shift
    adaptation"), and γ and β too if asked (Wang et al. 2021, "Tent"); or, where deployment's data
    stay as they are, `batchnorm.recalibrate(model, loader)` on unlabelled data of it.

    ## When it is fine

    A distance is no loss of accuracy: measure that where there are labels.

    ## Evidence

    DequanWang/tent#7
    """

    code = "BN126"
    name = "deployment far from training"
    looks_at = "deployment"

    def weigh(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for each layer that is near its training data and far from these."""
        for layer in evidence.layers:
            if layer.running is None or len(layer.deployed) < FEWEST:
                continue
            trained = running_distance(layer)
            if trained is not None and trained.is_harmful:
                continue
            mean, var = layer.running
            d = distance(mean, var, layer.deployed, layer.momentum, layer.eps)
            if d.is_harmful and not layer.is_new:
                yield self.found(
                    Severity.WARNING,
                    f"deployment's data lie {d.shift:.2g} ± {d.shift_error:.1g} standard "
                    f"deviations from the running mean, ×{d.stretch_factor:.2g} from the running "
                    "standard deviation",
                    [layer.path],
                    repair("adapt(model.eval())", "or recalibrate(model, deployment_loader)"),
                    **asdict(d),
                )
