from __future__ import annotations

import dataclasses
import json
import math

import pytest
from jsonschema import Draft202012Validator, ValidationError

from batchnorm.audit import (
    Distance,
    Finding,
    GradientNorm,
    LayerProfile,
    Noise,
    Period,
    Report,
    Severity,
)
from batchnorm.report import to_json
from batchnorm.report.json import SCHEMA_VERSION, schema
from reports import FAILED, WARNED, hostile, measured, of_ranks, report

LISTS = ("modules", "ranks")
VALIDATOR = Draft202012Validator(schema())


def test_json_holds_everything_under_a_version():
    data = json.loads(to_json(report(FAILED, WARNED, disabled={"BN103": "KeyError: 1"})))
    for finding in data["findings"]:
        finding.pop("is_guess", None)
        assert finding.pop("ranks") == []
    assert data == {
        "version": 1,
        "findings": [
            {
                "code": "BN109",
                "severity": "error",
                "message": "an input of shape (1, 3)",
                "modules": ["Net.c"],
                "fix": "drop_last=True",
                "place": None,
                "numbers": {},
                "name": "one value per channel",
            },
            {
                "code": "BN108",
                "severity": "warning",
                "message": "2 layers moved in 3 forward passes",
                "modules": ["Net.a", "Net.b"],
                "fix": "call model.eval() before this line",
                "place": "train.py:12",
                "numbers": {"layers": 2.0, "passes": 3.0},
                "name": "statistics moved with gradients off",
            },
        ],
        "layers": 3,
        "calls": 7,
        "rules": ["BN103", "BN108", "BN109"],
        "disabled": {"BN103": "KeyError: 1"},
        "subject": None,
        "graph": None,
        "profiles": [],
        "timeline": [],
        "ranks": 1,
        "endings": [],
    }


def test_a_report_comes_back_from_its_json():
    it = report(FAILED, WARNED, disabled={"BN103": 'ValueError: γ\n"quoted" \\ [red]'})
    data = json.loads(to_json(it))
    assert data.pop("version") == 1
    findings = tuple(
        Finding(**f | {n: tuple(f[n]) for n in LISTS} | {"severity": Severity(f["severity"])})
        for f in data.pop("findings")
    )
    for name in ("rules", "profiles", "timeline", "endings"):
        data[name] = tuple(data[name])
    assert Report(findings, **data) == it


def test_json_holds_the_ranks():
    data = json.loads(to_json(of_ranks()))
    assert data["ranks"] == 4
    assert [finding["ranks"] for finding in data["findings"]] == [[1, 2, 3], []]
    assert data["endings"][0] == {
        "rank": 1,
        "how": "told to end (SIGTERM)",
        "place": "train.py:31",
    }
    with pytest.raises(ValidationError):
        VALIDATOR.validate(data | {"ranks": 0})


def test_json_ends_its_last_line():
    assert to_json(report()).endswith("}\n")


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_json_is_valid_where_a_measurement_is_no_number(value):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    it = report(dataclasses.replace(WARNED, numbers={"shift": value}))
    json.loads(to_json(it), parse_constant=refuse)


@pytest.mark.parametrize(
    "it",
    [report(), report(FAILED, WARNED), measured(), measured(1), hostile(), of_ranks()],
    ids=["nothing", "findings", "measured", "one layer", "hostile", "ranks"],
)
def test_reports_have_the_form_that_the_schema_describes(it):
    VALIDATOR.validate(json.loads(to_json(it)))


def test_the_schema_is_one_and_of_this_version():
    Draft202012Validator.check_schema(schema())
    assert schema()["properties"]["version"]["const"] == SCHEMA_VERSION


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        (Report, ()),
        (Finding, ("$defs", "finding")),
        (LayerProfile, ("$defs", "profile")),
        (Distance, ("$defs", "distance")),
        (Noise, ("$defs", "noise")),
        (GradientNorm, ("$defs", "gradient")),
        (Period, ("$defs", "period")),
    ],
)
def test_the_schema_describes_every_key(kind, place):
    described = schema()
    for key in place:
        described = described[key]
    names = {field.name for field in dataclasses.fields(kind)}
    names |= {"version"} if kind is Report else set()
    assert names <= set(described["properties"])
    assert set(described["properties"]) - names <= {"is_guess"}
    for key, entry in described["properties"].items():
        assert entry.get("description") or "$ref" in entry, key


@pytest.mark.parametrize(
    ("key", "value"),
    [("version", 2), ("layers", "3"), ("findings", {}), ("calls", -1), ("profiles", None)],
)
def test_the_schema_refuses_what_is_none(key, value):
    data = json.loads(to_json(report(WARNED)))
    VALIDATOR.validate(data)
    with pytest.raises(ValidationError):
        VALIDATOR.validate({**data, key: value})
    del data[key]
    with pytest.raises(ValidationError):
        VALIDATOR.validate(data)


def test_numbers_that_are_none_are_null_in_profiles_too():
    profile = LayerProfile(
        "a",
        4,
        (-math.inf, 0.0, 0.0, 0.0, 0.0, 0.0, math.nan),
        distance=Distance(math.nan, 0.0, math.inf, 0.0),
        noise=Noise(math.nan, math.nan),
        gradients=(GradientNorm(1, math.inf),),
    )
    data = json.loads(to_json(dataclasses.replace(report(), profiles=(profile,))))
    VALIDATOR.validate(data)
    [it] = data["profiles"]
    assert it["weight"] == [None, 0, 0, 0, 0, 0, None]
    assert it["distance"] == {
        "shift": None,
        "shift_error": 0,
        "stretch": None,
        "stretch_error": 0,
    }
    assert it["noise"] == {"value": None, "error": None}
    assert it["gradients"] == [{"step": 1, "norm": None}]
