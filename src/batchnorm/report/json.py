"""A report as JSON, for programs."""

from __future__ import annotations

import dataclasses
import json
import math

from batchnorm.audit import Report

__all__ = ["SCHEMA_VERSION", "to_json"]

SCHEMA_VERSION = 1


def to_json(report: Report) -> str:
    """`{"version": 1, "findings": [{"code", "severity", "message", …}], "layers", …}`.

    The keys are those of `Report` and `Finding`; severities are their names. A number that is
    not finite is null, since JSON has none.
    """
    fields = dataclasses.asdict(report)
    for finding in fields["findings"]:
        numbers = finding["numbers"].items()
        finding["numbers"] = {k: v if math.isfinite(v) else None for k, v in numbers}
    return json.dumps({"version": SCHEMA_VERSION, **fields}, indent=2, allow_nan=False) + "\n"
