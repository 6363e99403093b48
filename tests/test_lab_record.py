"""What is kept of trials, and read back."""

import json
import math

import pytest

import invented
from batchnorm.lab.record import Record

TRIALS = [invented.Trial(arm, seed) for arm in ("none", "one") for seed in range(2)]


@pytest.fixture
def record():
    made = Record.new(invented.Invented, "full", 2, "cpu")
    for i, trial in enumerate(TRIALS):
        made.add(trial, {"level": i / 3, "never": None, "curve": [i / 7, 1e-12]}, 0.123)
    return made


def test_a_file_says_what_the_record_does(record, tmp_path):
    path = tmp_path / "invented.json"
    path.write_text(record.text({"verdict": None}), "utf-8")
    again = Record.load(path)
    assert again == record
    assert again.results(TRIALS).rows == record.results(TRIALS).rows
    assert again.results(TRIALS).where(arm="one").values("level") == [0.666667, 1.0]
    assert again.text({"verdict": None}) == record.text({"verdict": None})


def test_the_order_in_which_trials_end_is_not_seen(record):
    other = Record.new(invented.Invented, "full", 2, "cpu")
    for i, trial in reversed(list(enumerate(TRIALS))):
        other.add(trial, {"level": i / 3, "never": None, "curve": [i / 7, 1e-12]}, 0.123)
    assert other.text({}) == record.text({})


def test_six_digits_are_kept_however_small_the_number(record):
    row = record.results(TRIALS).where(arm="none").rows[1]
    assert row["curve"] == [0.142857, 1e-12]
    assert row["never"] is None


def test_an_empty_record_can_be_read(tmp_path):
    path = tmp_path / "invented.json"
    empty = Record.new(invented.Invented, "quick", 1, "cpu")
    path.write_text(empty.text({}), "utf-8")
    assert json.loads(path.read_text("utf-8"))["trials"] == []
    assert Record.load(path) == empty


@pytest.mark.parametrize("value", [math.nan, math.inf, [0.0, -math.inf]])
def test_what_is_no_number_is_refused(record, value):
    with pytest.raises(ValueError, match=r"level is -?(nan|inf)"):
        record.add(invented.Trial("two", 0), {"level": value}, 1.0)
    assert record.lacks(invented.Trial("two", 0))


def test_a_measure_may_not_hide_a_field(record):
    with pytest.raises(ValueError, match="'arm'"):
        record.add(invented.Trial("two", 0), {"arm": 1.0}, 1.0)
