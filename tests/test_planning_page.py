"""docs/synchronization.md shows what its script gives for the committed measurements."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from batchnorm.planning import LOOPBACK
from batchnorm.planning.planner import plan_layers

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch):
    """docs/synchronization.py, which imports what lies in benchmarks."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("page", ROOT / "docs" / "synchronization.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def results():
    return json.loads((ROOT / "benchmarks" / "sync.json").read_text("utf-8"))


def test_the_page_has_the_tables_that_its_script_makes(script):
    page = script.PAGE.read_text("utf-8")
    assert script.filled(page) == page, "run python docs/synchronization.py"


def test_the_network_of_the_library_is_the_one_measured(script, results):
    fit = script.sync.network_of(results)
    ours = (LOOPBACK.collective, LOOPBACK.message, LOOPBACK.byte)
    assert ours == (fit.collective, fit.message, fit.byte), (
        f"write collective={fit.collective}, message={fit.message}, byte={fit.byte} into "
        "LOOPBACK, src/batchnorm/planning/network.py, and run python docs/synchronization.py"
    )


def test_layers_sent_in_the_benchmark_what_the_model_says(script, results):
    rows = [row for row in results["steps"] if row["world"] > 1]
    assert rows
    for row in rows:
        layers = script.layers_of(row["network"])
        choice = plan_layers(layers, ranks=row["world"], batch=1).choices[-1]
        sent = row["sent"][script.sync.OURS]
        assert sent["collectives"] == choice.traffic.collectives
        assert sent["bytes"] == choice.traffic.bytes
        assert sent["messages"] == choice.traffic.messages


def test_the_benchmark_s_page_is_made_of_its_measurements(script, results):
    assert (ROOT / "benchmarks" / "sync.md").read_text("utf-8") == script.sync.text_of(results)


def test_a_page_without_one_of_the_tables_is_refused(script):
    page = script.PAGE.read_text("utf-8").replace("<!-- table: groups -->", "")
    with pytest.raises(ValueError, match="the page has the tables"):
        script.filled(page)


def test_links_of_the_page_lead_to_files(script):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", script.PAGE.read_text("utf-8")):
        assert (script.PAGE.parent / target).exists(), target
