"""`batchnorm run` under torchrun: one report of all ranks, whatever becomes of them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from launched import line_of, python, torchrun

BATCHNORM = Path(sys.executable).with_name("batchnorm")  # the command, as it is installed


def statuses(stderr: str) -> dict[int, int]:
    """Of the ranks that torchrun's own summary names."""
    summary = stderr[stderr.rindex("ChildFailedError") :]
    pairs = re.findall(r"rank +: (\d+) .*\n +exitcode +: (-?\d+)", summary)
    return {int(rank): int(status) for rank, status in pairs}


def test_what_only_one_rank_has_and_what_differs_between_them(tmp_path):
    script, output = "ranks_apart.py", tmp_path / "report.json"
    command = ("--no-python", str(BATCHNORM), "run", "--strict", "-o", str(output), script, "3")
    run = python(*torchrun(2), *command)
    assert sorted(run.stdout.splitlines()) == ["rank 0 has ended", "rank 1 has ended"]
    # each rank's own; that of the first is what --strict makes of the report
    assert statuses(run.stderr) == {0: 1, 1: 3}
    assert run.stderr.count("\nbatchnorm watched ") == 1
    assert list(tmp_path.iterdir()) == [output]  # the other rank writes nothing

    report = json.loads(output.read_text())
    assert (report["ranks"], report["disabled"]) == (2, {})
    assert report["endings"] == [{"rank": 1, "how": "exit status 3", "place": None}]
    found = {finding["code"]: finding for finding in report["findings"]}
    assert sorted(found) == ["BN108", "BN111", "BN112"]
    assert len(report["findings"]) == 3

    moved = found["BN108"]
    assert (moved["ranks"], moved["place"]) == ([1], line_of(script, "the mistake"))
    assert f"  at   {moved['place']}\n  on   rank 1 of 2\n" in run.stderr

    twice = found["BN111"]  # which both ranks made
    assert (twice["ranks"], twice["numbers"]) == ([], {"forwards": 2.0})
    assert run.stderr.count("BN111 warning") == 1

    differ = found["BN112"]
    assert differ["severity"] == "warning"
    first = "DistributedDataParallel.module.1"
    assert differ["modules"][0] == first
    # the second rank's shard lies 3 standard deviations aside; the layer sees a mix of its inputs
    assert 1 < differ["numbers"]["shift"] < 4
    assert (differ["numbers"]["rank"], differ["numbers"]["other_rank"]) == (0, 1)
    assert "ranks 0 and 1 evaluated with running statistics that differ by " in differ["message"]


def test_ranks_that_call_layers_unequally_often():
    script = "ranks_out_of_step.py"
    run = python(*torchrun(2), "-m", "batchnorm", "run", script)
    assert statuses(run.stderr) == {0: 1}
    assert run.stderr.count("\nbatchnorm watched ") == 1
    assert "BN114 error: ranks out of step where they synchronize\n" in run.stderr
    name = "DistributedDataParallel of Sequential"
    assert (
        f"  {name} was called 28 times in training mode on rank 0, 27 times on rank 1, which has "
        "ended\n"
    ) in run.stderr
    assert "BN108" not in run.stderr
    assert "BN112" not in run.stderr  # one was a step ahead


@pytest.mark.parametrize("killed", [0, 2])
def test_a_rank_is_killed_and_others_hang(killed):
    """The first reports, though it hangs in a collective; where it was killed, another does."""
    script = "ranks_stuck.py"
    run = python(*torchrun(3), "-m", "batchnorm", "run", script, str(killed))
    told = dict.fromkeys(range(3), -15) | {killed: -9}
    assert statuses(run.stderr) == told  # as without us
    assert run.stderr.count("\nbatchnorm watched ") == 1
    assert (
        "\nbatchnorm watched 1 layer in 1 forward pass on the rank that reports, of 3: "
        in run.stderr
    )
    lines = run.stderr.splitlines()
    assert f"  rank {killed} of 3: no report: killed, hung, or still running" in lines
    waits, sleeps = line_of(script, "where it waits"), line_of(script, "where it sleeps")
    if killed:
        assert f"  rank 0 of 3: told to end (SIGTERM), at {waits}" in lines
        assert f"  rank 1 of 3: told to end (SIGTERM), at {sleeps}" in lines
    else:
        assert f"  ranks 1 and 2 of 3: told to end (SIGTERM), at {sleeps}" in lines
