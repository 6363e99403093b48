from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from jsonschema import Draft4Validator

from batchnorm import __version__
from batchnorm.audit import Severity, find_rule
from batchnorm.report import to_sarif
from reports import CODES, FAILED, WARNED, hostile, measured, of_ranks, report

SCHEMA = Path(__file__).parent / "schemas" / "sarif-schema-2.1.0.json"
VALIDATOR = Draft4Validator(
    json.loads(SCHEMA.read_text("utf-8")), format_checker=Draft4Validator.FORMAT_CHECKER
)


def run(it) -> dict:
    """The one run of a report's SARIF, which has been found valid."""
    data = json.loads(to_sarif(it))
    VALIDATOR.validate(data)
    [only] = data["runs"]
    return only


@pytest.mark.parametrize("it", [report(), measured(), measured(200), hostile()])
def test_sarif_is_valid(it):
    assert len(run(it)["results"]) == len(it.findings)


def test_the_rules_are_those_that_looked_with_their_pages():
    driver = run(report(WARNED))["tool"]["driver"]
    assert (driver["name"], driver["version"]) == ("batchnorm", __version__)
    assert [rule["id"] for rule in driver["rules"]] == list(CODES)
    rule, kind = driver["rules"][1], find_rule("BN108")
    assert rule["name"] == "MovedWithoutGradients"
    assert rule["shortDescription"]["text"] == kind.name
    assert rule["help"] == {"text": kind.page(), "markdown": kind.page()}
    said = rule["fullDescription"]["text"]
    assert said in " ".join(kind.page().split())
    assert said[-1] in ".:"
    assert "##" not in said


def test_results_say_what_was_found_the_worst_first():
    fact = dataclasses.replace(WARNED, severity=Severity.INFO, numbers={"x": math.inf})
    it = run(report(fact, WARNED, FAILED))
    assert [result["level"] for result in it["results"]] == ["error", "warning", "note"]
    rules = it["tool"]["driver"]["rules"]
    assert [rules[result["ruleIndex"]]["id"] for result in it["results"]] == [
        result["ruleId"] for result in it["results"]
    ]
    assert it["results"][0]["locations"] == [
        {
            "logicalLocations": [
                {"name": "c", "fullyQualifiedName": "Net.c", "kind": "member"},
            ]
        }
    ]
    assert it["results"][1] == {
        "ruleId": "BN108",
        "ruleIndex": 1,
        "level": "warning",
        "message": {
            "text": "2 layers moved in 3 forward passes. Fix: call model.eval() before this line"
        },
        "locations": [
            {
                "physicalLocation": {
                    "artifactLocation": {"uri": "train.py"},
                    "region": {"startLine": 12},
                },
                "logicalLocations": [
                    {"name": "a", "fullyQualifiedName": "Net.a", "kind": "member"},
                    {"name": "b", "fullyQualifiedName": "Net.b", "kind": "member"},
                ],
            }
        ],
        "properties": {
            "fix": "call model.eval() before this line",
            "place": "train.py:12",
            "numbers": {"layers": 2.0, "passes": 3.0},
            "ranks": [],
        },
    }
    assert it["results"][2]["properties"]["numbers"] == {"x": None}


@pytest.mark.parametrize(
    ("file", "uri"),
    [
        ("examples/digits.py", "examples/digits.py"),
        ("my models/größe#1.py", "my%20models/gr%C3%B6%C3%9Fe%231.py"),
        ("a:b%.py", "a%3Ab%25.py"),
        ("/home/me/a b.py", "file:///home/me/a%20b.py"),
        ("src\\net.py", "src/net.py"),
        ("C:\\my code\\net.py", "file:///C:/my%20code/net.py"),
        ("\\\\host\\share\\net.py", "file://host/share/net.py"),
    ],
)
def test_a_file_is_a_uri(file, uri):
    [result] = run(report(dataclasses.replace(WARNED, place=f"{file}:3")))["results"]
    physical = result["locations"][0]["physicalLocation"]
    assert physical == {"artifactLocation": {"uri": uri}, "region": {"startLine": 3}}


def test_a_finding_without_place_and_modules_has_no_location():
    [result] = run(report(dataclasses.replace(FAILED, modules=())))["results"]
    assert "locations" not in result


def test_a_finding_of_somebody_elses_rule_brings_its_rule():
    it = run(report(dataclasses.replace(WARNED, code="XY1")))
    assert it["tool"]["driver"]["rules"][-1] == {
        "id": "XY1",
        "shortDescription": {"text": WARNED.name},
    }
    assert it["results"][0]["ruleIndex"] == len(CODES)


def test_ranks_that_have_it_and_how_they_ended():
    it = run(of_ranks())
    failed, warned = it["results"]
    assert warned["properties"]["ranks"] == [1, 2, 3]
    assert "in 3 forward passes, on ranks 1–3 of 4. Fix: " in warned["message"]["text"]
    assert failed["properties"]["ranks"] == []
    assert " on rank" not in failed["message"]["text"]
    assert it["properties"]["ranks"] == 4
    told = it["invocations"][0]["toolExecutionNotifications"]
    assert [note["message"]["text"] for note in told] == [
        "ranks 1 and 3 of 4: told to end (SIGTERM), at train.py:31",
        "rank 2 of 4: exit status 1",
    ]


def test_a_rule_that_was_switched_off_is_a_notification():
    it = run(report(disabled={"BN103": "KeyError: 7", "XY1": "?"}))
    [invocation] = it["invocations"]
    assert invocation["executionSuccessful"]
    first, second = invocation["toolExecutionNotifications"]
    assert first == {
        "level": "warning",
        "associatedRule": {"id": "BN103", "index": 0},
        "message": {"text": "BN103 was switched off and the run went on: KeyError: 7"},
    }
    assert second["associatedRule"] == {"id": "XY1"}


def test_text_is_neither_placeholder_nor_link():
    it = dataclasses.replace(WARNED, message="{0} [here](http://example.org) of shape [1, 3]")
    [result] = run(report(it))["results"]
    assert result["message"]["text"].startswith(
        r"{{0}} [here\](http://example.org) of shape [1, 3]. Fix: "
    )
