"""A report as JSON, for programs."""

from __future__ import annotations

import dataclasses
import json

from batchnorm.audit import Report

__all__ = ["SCHEMA_VERSION", "to_json"]

SCHEMA_VERSION = 1


def to_json(report: Report) -> str:
    """`{"version": 1, "findings": [{"code", "severity", "message", …}], "layers", …}`.

    The keys are those of `Report` and `Finding`; severities are their names.
    """
    return json.dumps({"version": SCHEMA_VERSION, **dataclasses.asdict(report)}, indent=2) + "\n"
