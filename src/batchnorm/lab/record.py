"""What a claim's trials measured, kept in a file."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from batchnorm.lab.claim import AnyClaim, AnyTrial
from batchnorm.lab.fingerprint import fingerprint
from batchnorm.lab.profile import PROFILES
from batchnorm.lab.results import Outcome, Results

__all__ = ["Done", "Record", "RecordError", "key_of", "record_path"]

VERSION = 1
_DIGITS = 6  # significant ones that are kept: no seed is known better


class RecordError(ValueError):
    """A file of results that cannot be used, or not for this."""


@dataclass(frozen=True)
class Done:
    """A trial that has run; `seconds` of one core."""

    trial: Mapping[str, Any]
    outcome: Mapping[str, Any]
    seconds: float


@dataclass
class Record:
    """The trials of a claim that have run, and what they were run with.

    `fingerprint`: of the experiment's code, see `batchnorm.lab.fingerprint`. `environment`:
    versions and the processor.
    """

    claim: str
    profile: str
    seeds: int
    device: str
    fingerprint: str
    environment: dict[str, str]
    done: dict[str, Done] = field(default_factory=dict)

    @classmethod
    def new(cls, claim: type[AnyClaim], profile: str, seeds: int, device: str) -> Record:
        """Of no trial yet."""
        return cls(claim.name, profile, seeds, device, fingerprint(claim), _environment())

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read a file that `text` made.

        Raises:
            RecordError: It is none.
            OSError: It cannot be read.
        """
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
            if read["version"] != VERSION:
                raise RecordError(
                    f"{path} has results of form {read['version']}, this is {VERSION}; "
                    "measure again into another directory"
                )
            if read["profile"] not in PROFILES:
                raise KeyError(read["profile"])
            done = [
                Done(each["trial"], each["outcome"], each["seconds"]) for each in read["trials"]
            ]
            return cls(
                read["claim"],
                read["profile"],
                read["seeds"],
                read["device"],
                read["fingerprint"],
                read["environment"],
                {key_of(each.trial): each for each in done},
            )
        except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise RecordError(
                f"{path} holds no results of `batchnorm lab run` ({error!r}); move it away"
            ) from error

    def add(self, trial: AnyTrial, outcome: Outcome, seconds: float) -> None:
        """Take in what a trial measured.

        Raises:
            ValueError: A number is not finite, which no file of JSON can say.
        """
        fields = asdict(trial)
        rounded = {name: _rounded(name, value) for name, value in outcome.items()}
        clashing = rounded.keys() & fields.keys()
        if clashing:
            raise ValueError(f"{sorted(clashing)} are fields of the trial, and not to be measured")
        self.done[key_of(fields)] = Done(fields, rounded, round(seconds, 2))

    def results(self, trials: Iterable[AnyTrial]) -> Results:
        """What these trials measured, of those that have run."""
        keys = [key_of(asdict(trial)) for trial in trials]
        done = [self.done[key] for key in keys if key in self.done]
        return Results({**each.trial, **each.outcome} for each in done)

    def lacks(self, trial: AnyTrial) -> bool:
        """Whether a trial has yet to run."""
        return key_of(asdict(trial)) not in self.done

    def text(self, answers: Mapping[str, Any]) -> str:
        """The file: what was run, what it says (of a finished record), and a line a trial."""
        head = {
            "version": VERSION,
            "claim": self.claim,
            "profile": self.profile,
            "seeds": self.seeds,
            "device": self.device,
            "fingerprint": self.fingerprint,
            "environment": self.environment,
            **answers,
        }
        # in an order that does not depend on which of them ended first
        lines = [json.dumps(asdict(self.done[key]), allow_nan=False) for key in sorted(self.done)]
        opened = json.dumps(head, indent=1, ensure_ascii=False, allow_nan=False)
        return f'{opened[:-2]},\n "trials": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"


def record_path(directory: Path, claim: type[AnyClaim]) -> Path:
    """Where a claim's results are kept."""
    return directory / f"{claim.name}.json"


def key_of(trial: Mapping[str, Any]) -> str:
    """What tells a trial from all others of its claim."""
    return json.dumps(trial, sort_keys=True)


def _rounded(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(name, each) for each in value]
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}; a trial measures finite numbers, or None")
    return float(f"{value:.{_DIGITS}g}")


def _environment() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        **{name: version(name) for name in ("batchnorm", "scikit-learn", "mlxtend")},
        "processor": _processor(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
