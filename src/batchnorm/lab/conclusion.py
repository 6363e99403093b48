"""What the results of a claim say of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from batchnorm.lab.claim import AnyClaim
from batchnorm.lab.fingerprint import fingerprint
from batchnorm.lab.hypothesis import Answer, Judgement, Verdict, verdict_of
from batchnorm.lab.profile import PROFILES, Profile
from batchnorm.lab.record import Record, RecordError
from batchnorm.lab.results import Results
from batchnorm.report.summary import count

__all__ = ["Conclusion", "conclude"]


@dataclass(frozen=True)
class Conclusion:
    """A claim, what was measured, and the verdict that follows.

    `verdict`: None for the quick profile and for fewer than five seeds. `missing`: trials that
    have yet to run. `is_current`: whether the experiment is still the one that was run.
    """

    claim: type[AnyClaim]
    record: Record
    results: Results
    judgements: tuple[Judgement, ...]
    verdict: Verdict | None
    missing: int
    is_current: bool

    def setting(self, judgement: Judgement) -> str:
        """Where it was measured, and what, if several measures were taken there."""
        where = judgement.hypothesis.where
        several = sum(each.hypothesis.where == where for each in self.judgements) > 1
        return f"{where} ({judgement.hypothesis.measure})" if several else where

    def settings(self, answer: Answer) -> list[str]:
        """Where the hypotheses have this answer."""
        return [self.setting(each) for each in self.judgements if each.answer is answer]

    def reason(self) -> str:
        """Why the verdict is what it is, to be read behind it."""
        if self.missing:
            changed = "" if self.is_current else "; the experiment has changed since this run"
            return f"{count(self.missing, 'trial')} yet to run{changed}"
        if self.verdict is None:
            return f"the {self.record.profile} profile, {count(self.record.seeds, 'seed')}"
        if self.verdict is Verdict.SUPPORTED:
            n = len(self.judgements)
            return "it holds" if n == 1 else f"all {n} hypotheses hold"
        named = [
            ("holds for", Answer.HOLDS),
            ("fails for", Answer.FAILS),
            ("open for", Answer.OPEN),
        ]
        parts = [f"{how} {' · '.join(self.settings(a))}" for how, a in named if self.settings(a)]
        return "; ".join(parts)

    def as_json(self) -> dict[str, Any]:
        """The hypotheses with their answers, and the verdict, for a record's file."""
        return {
            "sentence": self.claim.sentence(),
            "source": self.claim.source,
            "verdict": None if self.verdict is None else self.verdict.value,
            "reason": self.reason(),
            "hypotheses": [_as_json(each) for each in self.judgements],
        }


def conclude(claim: type[AnyClaim], record: Record) -> Conclusion:
    """Judge each hypothesis by a record, and the claim by all of them.

    The quick profile runs only some settings: hypotheses on others are left out. A record with
    trials missing is not judged.
    """
    profile = Profile(PROFILES[record.profile].name, record.seeds)
    trials = list(claim().trials(profile))
    results = record.results(trials)
    missing = len(trials) - len(results)
    is_current = record.fingerprint == fingerprint(claim)
    try:
        judgements = () if missing else tuple(_judged(claim, results, profile))
    except (LookupError, ValueError) as error:
        if is_current:
            raise
        raise RecordError(
            f"the results of {claim.name} are of an earlier form of the experiment, which this one "
            f"cannot read; batchnorm lab run {claim.name}"
        ) from error
    is_judged = bool(judgements) and profile.is_full
    return Conclusion(
        claim,
        record,
        results,
        judgements,
        verdict_of(judgements) if is_judged else None,
        missing,
        is_current,
    )


def _judged(claim: type[AnyClaim], results: Results, profile: Profile) -> list[Judgement]:
    judged = []
    for hypothesis in claim.hypotheses:
        try:
            judged.append(hypothesis.judge(results))
        except LookupError as error:
            # a KeyError is a mistake, not a setting that was left out
            if profile.is_full or type(error) is not LookupError:
                raise
    return judged


def _as_json(judgement: Judgement) -> dict[str, Any]:
    hypothesis, interval = judgement.hypothesis, judgement.interval
    low, high = (end if math.isfinite(end) else None for end in (interval.low, interval.high))
    return {
        "where": hypothesis.where,
        "measure": hypothesis.measure,
        "unit": hypothesis.unit,
        "more_than": hypothesis.more_than,
        "less_than": hypothesis.less_than,
        "mean": interval.mean,
        "low": low,
        "high": high,
        "n": interval.n,
        "values": list(judgement.values),
        "answer": judgement.answer.value,
    }
