"""A report as JSON, for programs."""

from __future__ import annotations

import dataclasses
import json
import math
from importlib.resources import files
from typing import Any

from batchnorm.audit import Report

__all__ = ["SCHEMA_VERSION", "finite", "schema", "to_json"]

SCHEMA_VERSION = 1


def to_json(report: Report) -> str:
    """`{"version": 1, "findings": [{"code", "severity", "message", …}], "layers", …}`.

    The keys are those of `Report` and of what it holds; severities are their names. A number
    that is not finite is null, since JSON has none. `schema` describes every key.
    """
    fields = finite(dataclasses.asdict(report))
    return json.dumps({"version": SCHEMA_VERSION, **fields}, indent=2, allow_nan=False) + "\n"


def schema() -> dict[str, Any]:
    """The JSON Schema of what `to_json` writes."""
    text = files("batchnorm.report").joinpath("schemas/report.schema.json").read_text("utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def finite(value: Any) -> Any:
    """`value` with None for every number in it that JSON has not."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
