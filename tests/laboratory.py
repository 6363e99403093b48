"""Run a claim's quick profile within a test."""

from __future__ import annotations

from dataclasses import asdict

import torch

from batchnorm.lab.claim import AnyClaim
from batchnorm.lab.profile import QUICK
from batchnorm.lab.results import Results


def quick(claim: type[AnyClaim]) -> Results:
    """What the trials of the quick profile measure, one seed of each."""
    made = claim()
    rows = []
    for trial in made.trials(QUICK):
        torch.manual_seed(trial.seed)
        rows.append({**asdict(trial), **made.run(trial, torch.device("cpu"))})
    return Results(rows)
