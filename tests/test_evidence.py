"""docs/evidence.md is what `batchnorm lab report` makes of the committed numbers."""

import json
import re
import xml.etree.ElementTree as ElementTree
from functools import cache
from pathlib import Path

import pytest

from batchnorm.lab.claims import CLAIMS
from batchnorm.lab.conclusion import conclude
from batchnorm.lab.hypothesis import ENOUGH_SEEDS
from batchnorm.lab.page import to_markdown, verdict_word
from batchnorm.lab.record import Record, record_path

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "evidence"
PAGE = DOCS / "evidence.md"
IDS = [claim.name for claim in CLAIMS]


@cache
def concluded(claim):
    return conclude(claim, Record.load(record_path(RESULTS, claim)))


def test_there_are_all_claims_of_the_issue():
    assert [claim.number for claim in CLAIMS] == list(range(1, 22))
    assert len(set(IDS)) == 21
    assert sorted(path.stem for path in RESULTS.glob("*.json")) == sorted(IDS)


@pytest.mark.parametrize("claim", CLAIMS, ids=IDS)
def test_a_full_run_lies_behind_each_verdict(claim):
    conclusion = concluded(claim)
    assert conclusion.record.profile == "full"
    assert conclusion.record.seeds >= ENOUGH_SEEDS
    assert not conclusion.missing
    assert len(conclusion.judgements) == len(claim.hypotheses)
    written = json.loads(record_path(RESULTS, claim).read_text("utf-8"))
    computed = conclusion.as_json()
    told, seen = written.pop("hypotheses"), computed.pop("hypotheses")
    assert {key: written[key] for key in computed} == computed
    for one, other in zip(told, seen, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            is_measured = key in ("mean", "low", "high", "values")  # to rounding, elsewhere
            expected = other[key]
            assert value == (pytest.approx(expected, rel=1e-6) if is_measured else expected)
    assert written["verdict"] in ("supported", "not supported", "depends")


def test_the_page_is_made_of_the_numbers():
    page = to_markdown([concluded(claim) for claim in CLAIMS], RESULTS, PAGE)
    assert PAGE.read_text("utf-8") == page, (
        "run batchnorm lab report docs/evidence -o docs/evidence.md; where it then says that an "
        "experiment has been changed since its run, make evidence"
    )


def test_links_of_the_page_lead_to_files_and_headings():
    page = PAGE.read_text("utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", page):
        assert (DOCS / target).exists(), target
    # GitHub's: lower case, without marks, and a hyphen for a space
    headings = {
        re.sub(r"[^\w\- ]", "", line[3:].lower()).replace(" ", "-")
        for line in page.splitlines()
        if line.startswith("## ")
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", page)) == headings
    assert len(headings) == 21


@pytest.mark.parametrize("claim", CLAIMS, ids=IDS)
def test_figures_name_their_seeds(claim):
    text = (RESULTS / f"{claim.name}.svg").read_text("utf-8")
    words = " ".join(ElementTree.fromstring(text).itertext())  # noqa: S314 - our own file
    assert f"n = {concluded(claim).record.seeds} seeds" in words


def test_the_readme_s_verdicts_are_those():
    readme = (DOCS.parent / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d+) \| (.+?) \| (.+?) \|$", readme, flags=re.MULTILINE)
    assert rows == [
        (str(claim.number), claim.sentence(), verdict_word(concluded(claim))) for claim in CLAIMS
    ]
