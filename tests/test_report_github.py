from __future__ import annotations

import dataclasses
import re

import pytest

from batchnorm.audit import Severity
from batchnorm.report import to_github
from reports import FAILED, HOSTILE, WARNED, hostile, of_ranks, report


def parsed(line: str) -> tuple[str, dict[str, str], str]:
    """A command as GitHub's runner reads it (actions/runner, ActionCommand.cs)."""
    command, rest = re.fullmatch(r"::(\w+) (.*)", line).groups()
    properties, _, data = rest.partition("::")
    read = {}
    for entry in properties.split(","):
        key, _, value = entry.partition("=")
        read[key] = _unescaped(value.replace("%3A", ":").replace("%2C", ","))
    return command, read, _unescaped(data)


def _unescaped(text: str) -> str:
    return text.replace("%0D", "\r").replace("%0A", "\n").replace("%25", "%")


def test_each_finding_is_one_command_the_worst_first():
    fact = dataclasses.replace(WARNED, severity=Severity.INFO, place=None)
    assert to_github(report(fact, WARNED, FAILED)).splitlines() == [
        "::error title=BN109%3A one value per channel"
        "::an input of shape (1, 3)%0Ain Net.c%0Afix: drop_last=True",
        "::warning file=train.py,line=12,title=BN108%3A statistics moved with gradients off"
        "::2 layers moved in 3 forward passes%0Ain Net.a, Net.b"
        "%0Afix: call model.eval() before this line",
        "::notice title=BN108%3A statistics moved with gradients off"
        "::2 layers moved in 3 forward passes%0Ain Net.a, Net.b"
        "%0Afix: call model.eval() before this line",
    ]


def test_nothing_found_is_nothing_printed():
    assert to_github(report()) == ""


def test_a_rule_that_was_switched_off_is_a_notice():
    text = to_github(report(disabled={"BN103": "KeyError: 7"}))
    assert parsed(text.rstrip("\n")) == (
        "notice",
        {"title": "BN103 was switched off"},
        "KeyError: 7",
    )


def test_ranks_that_have_it_and_how_they_ended():
    commands = [parsed(line) for line in to_github(of_ranks()).splitlines()]
    assert "\non ranks 1–3 of 4\nfix: " in commands[1][2]
    assert "\non " not in commands[0][2]
    ended = {"title": "a rank that did not end well"}
    assert commands[2:] == [
        ("notice", ended, "ranks 1 and 3 of 4: told to end (SIGTERM), at train.py:31"),
        ("notice", ended, "rank 2 of 4: exit status 1"),
    ]


@pytest.mark.parametrize("odd", ["a,b:c=d::e", "100%", "%0A%3A", "α, β", "C:\\x, y\\"])
def test_every_property_comes_back(odd):
    finding = dataclasses.replace(
        WARNED, message=odd, modules=(odd,), fix=odd, place=f"{odd}.py:3", name=odd, code=odd
    )
    [line] = to_github(report(finding)).splitlines()
    assert parsed(line) == (
        "warning",
        {"file": f"{odd}.py", "line": "3", "title": f"{odd}: {odd}"},
        f"{odd}\nin {odd}\nfix: {odd}",
    )


@pytest.mark.parametrize(
    "place", ["train.py", "train.py:", ":3", "train.py:0", "train.py:x", "a:²"]
)
def test_a_place_that_is_no_line_stands_in_the_message(place):
    [line] = to_github(report(dataclasses.replace(WARNED, place=place))).splitlines()
    _, properties, data = parsed(line)
    assert set(properties) == {"title"}
    assert f"\nat {place}\n" in data


def test_nobody_can_add_a_command():
    it = hostile()
    text = to_github(it)
    lines = text.split("\n")
    assert lines.pop() == ""
    assert len(lines) == len(it.findings) + len(it.disabled) + len(it.endings)
    for line in lines:
        assert re.match(r"::(warning|notice) (file|title)=", line)
        assert line.isprintable()
    text.encode("utf-8")
    assert HOSTILE[-1] in text
