"""Running claims: in processes, kept as they come, gone on with, and ended whatever happens."""

import json
import os
from dataclasses import replace

import pytest
import torch
from filelock import FileLock

import invented
from batchnorm.lab.hypothesis import Answer, Verdict
from batchnorm.lab.profile import FULL, QUICK, Profile
from batchnorm.lab.record import RecordError
from batchnorm.lab.runner import run_claims


def read(directory, name="invented"):
    return json.loads((directory / f"{name}.json").read_text("utf-8"))


def outcomes(directory):
    kept = ("level", "drawn")
    return [
        (row["trial"], {k: row["outcome"][k] for k in kept}) for row in read(directory)["trials"]
    ]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ran")
    conclusions, failures = run_claims([invented.Invented], FULL, directory, processes=2)
    assert not failures
    return directory, conclusions[0]


def test_it_concludes_from_all_trials(ran):
    directory, conclusion = ran
    assert conclusion.verdict is Verdict.DEPENDS
    assert [j.answer for j in conclusion.judgements] == [Answer.HOLDS, Answer.FAILS]
    assert conclusion.reason() == "holds for one; fails for two"
    # the same seed draws the same, whatever the arm
    assert conclusion.judgements[0].interval.mean == pytest.approx(1.0, abs=1e-5)
    assert conclusion.judgements[1].values == pytest.approx((2.0,) * 5, abs=1e-5)
    written = read(directory)
    assert written["verdict"] == "depends"
    assert written["seeds"] == 5
    assert len(written["trials"]) == 15
    assert [h["answer"] for h in written["hypotheses"]] == ["holds", "fails"]
    assert (directory / "invented.svg").read_text("utf-8").startswith("<?xml")


def test_trials_run_elsewhere_on_one_thread_from_their_seed(ran):
    directory, _ = ran
    rows = read(directory)["trials"]
    assert {row["outcome"]["threads"] for row in rows} == {1}
    assert os.getpid() not in {row["outcome"]["process"] for row in rows}
    for row in rows:
        torch.manual_seed(row["trial"]["seed"])
        assert row["outcome"]["drawn"] == pytest.approx(float(torch.rand(())), rel=1e-5)


def test_the_number_of_processes_changes_no_number(ran, tmp_path):
    run_claims([invented.Invented], FULL, tmp_path, processes=1)
    assert outcomes(tmp_path) == outcomes(ran[0])


def test_more_seeds_are_added_to_those_there_are(tmp_path):
    run_claims([invented.Invented], Profile("full", 2), tmp_path, processes=1)
    before = {json.dumps(r["trial"]): r["outcome"] for r in read(tmp_path)["trials"]}
    steps = []
    conclusions, _ = run_claims(
        [invented.Invented], FULL, tmp_path, processes=1, notify=steps.append
    )
    assert (steps[0].done, steps[0].total) == (6, 15)
    assert [step.done for step in steps] == list(range(6, 16))
    after = {json.dumps(r["trial"]): r["outcome"] for r in read(tmp_path)["trials"]}
    assert {key: after[key] for key in before} == before  # the very processes that ran them
    assert conclusions[0].verdict is Verdict.DEPENDS


def test_all_there_means_nothing_to_run(ran):
    directory, first = ran
    before = (directory / "invented.json").read_bytes()
    (again,), failures = run_claims([invented.Invented], FULL, directory)
    assert not failures
    assert again.judgements == first.judgements
    assert (directory / "invented.json").read_bytes() == before


def test_fewer_seeds_are_judged_by_those_alone(ran, tmp_path):
    (tmp_path / "invented.json").write_bytes((ran[0] / "invented.json").read_bytes())
    (conclusion,), _ = run_claims([invented.Invented], Profile("full", 4), tmp_path)
    assert conclusion.verdict is None
    assert conclusion.judgements[0].interval.n == 4


def test_the_quick_profile_gives_no_verdict_however_many_seeds(tmp_path):
    (conclusion,), _ = run_claims([invented.Invented], Profile("quick", 6), tmp_path, processes=1)
    assert conclusion.verdict is None
    assert [j.hypothesis.where for j in conclusion.judgements] == ["one"]  # two has not been run
    assert read(tmp_path)["verdict"] is None


def test_an_experiment_that_has_changed_begins_anew(ran, tmp_path):
    text = (ran[0] / "invented.json").read_text("utf-8")
    old = read(ran[0])["fingerprint"]
    (tmp_path / "invented.json").write_text(text.replace(old, "0" * 12))
    steps = []
    run_claims([invented.Invented], FULL, tmp_path, processes=1, notify=steps.append)
    assert steps[0].again
    assert steps[0].done == 0
    assert read(tmp_path)["fingerprint"] == old
    assert (tmp_path / f"invented.{'0' * 12}.json").read_text("utf-8").count('"seed"') == 15


def test_results_of_another_profile_or_nature_are_not_touched(ran, tmp_path):
    path = tmp_path / "invented.json"
    path.write_bytes((ran[0] / "invented.json").read_bytes())
    for profile, device in ((QUICK, "cpu"), (FULL, "meta")):
        with pytest.raises(RecordError, match="give another --output"):
            run_claims([invented.Invented], profile, tmp_path, device=device)
    assert path.read_bytes() == (ran[0] / "invented.json").read_bytes()
    for text in ("no json", "[]", "{}", '{"version": 1, "claim": "invented"}'):
        path.write_text(text)
        with pytest.raises(RecordError, match="move it away"):
            run_claims([invented.Invented], FULL, tmp_path)
        assert path.read_text() == text
    path.write_text('{"version": 2}')
    with pytest.raises(RecordError, match="of form 2"):
        run_claims([invented.Invented], FULL, tmp_path)


def test_two_runs_do_not_write_into_one_directory(tmp_path):
    (tmp_path / "invented.json").write_text("theirs")
    with (
        FileLock(tmp_path / ".lock"),
        pytest.raises(RecordError, match="another run writes into"),
    ):
        run_claims([invented.Invented], FULL, tmp_path)
    assert (tmp_path / "invented.json").read_text() == "theirs"


def test_a_trial_that_raises_stops_no_other(tmp_path):
    claims = [invented.Failing, invented.Invented]
    conclusions, failures = run_claims(claims, Profile("full", 2), tmp_path, processes=1)
    assert [(f.claim, f.trial.seed) for f in failures] == [(invented.Failing, 1)] * 3
    assert "ArithmeticError: an odd seed" in failures[0].reason
    assert [each.missing for each in conclusions] == [3, 0]
    assert conclusions[0].reason() == "3 trials yet to run"
    assert "in run\n" in (tmp_path / "failures.txt").read_text("utf-8")  # the trial's own line
    assert len(read(tmp_path, "failing")["trials"]) == 3
    assert not (tmp_path / "failing.svg").exists()
    assert (tmp_path / "invented.svg").exists()


def test_a_conclusion_that_raises_loses_no_number(tmp_path, monkeypatch):
    broken = replace(invented.Invented.hypotheses[0], effect=lambda results: [1 / 0])
    monkeypatch.setattr(invented.Invented, "hypotheses", (broken,))
    conclusions, failures = run_claims([invented.Invented], FULL, tmp_path, processes=1)
    assert not conclusions
    assert [(f.claim, f.trial) for f in failures] == [(invented.Invented, None)]
    assert "ZeroDivisionError" in failures[0].reason
    assert len(read(tmp_path)["trials"]) == 15


def test_a_process_that_dies_loses_nothing_of_the_others(tmp_path):
    with pytest.raises(RuntimeError, match="run again to go on"):
        run_claims([invented.Deadly], FULL, tmp_path, processes=2)
    kept = read(tmp_path, "deadly")
    assert kept["verdict"] is None
    assert len(kept["trials"]) >= 4


def test_an_interruption_keeps_what_had_run(tmp_path):
    def interrupt(step):
        if step.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_claims([invented.Slow], FULL, tmp_path, processes=1, notify=interrupt)
    assert len(read(tmp_path, "slow")["trials"]) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["slow.json"]
