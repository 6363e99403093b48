"""The page of the evidence, in Markdown and in HTML."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import torch
from markdown_it import MarkdownIt

import invented
from batchnorm.lab.conclusion import conclude
from batchnorm.lab.figures import to_svg
from batchnorm.lab.page import to_html, to_markdown
from batchnorm.lab.profile import FULL, QUICK
from batchnorm.lab.record import Record


def concluded(profile):
    claim = invented.Invented
    record = Record.new(claim, profile.name, profile.seeds, "cpu")
    for trial in claim().trials(profile):
        torch.manual_seed(trial.seed)
        record.add(trial, claim().run(trial, torch.device("cpu")), 6.0)
    return conclude(claim, record)


@pytest.fixture(scope="module")
def full():
    return concluded(FULL)


def cells(page):
    """The rows of all tables, as Markdown's reader sees them."""
    tokens = MarkdownIt("commonmark").enable("table").parse(page)
    rows = []
    for before, token in pairwise(tokens):
        if before.type == "tr_open":
            rows.append([])
        if before.type in ("td_open", "th_open"):
            rows[-1].append(token.content)
    return rows


def test_the_table_has_claim_verdict_effect_with_interval_and_figure(full, tmp_path):
    page = to_markdown([full], tmp_path / "docs" / "evidence", tmp_path / "docs" / "evidence.md")
    summary, _, one, two = (row for row in cells(page) if len(row) == 5 and row[0])
    effects = "one: 1 [1, 1], holds<br>two: 2 points [2, 2], fails"
    link = "[An arm adds what it is said to add.](#1-an-arm-adds-what-it-is-said-to-add)"
    assert summary == ["1", link, "**depends**", effects, "[figure](evidence/invented.svg)"]
    assert one == ["one", "added | measured", "> 0.5", "1 [1, 1]", "holds"]
    assert two == ["two", "added", "< 1.5 points", "2 points [2, 2]", "fails"]
    assert "## 1. An arm adds what it is said to add\n" in page
    assert "**Depends**: holds for one; fails for two." in page
    assert "Source: nobody 1900, section 0." in page
    assert "![An arm adds what it is said to add.](evidence/invented.svg)" in page
    assert "15 trials, 1.5 minutes of one core. [All numbers](evidence/invented.json)." in page


def test_links_start_from_where_the_page_lies(full, tmp_path):
    page = to_markdown([full], tmp_path / "results", tmp_path / "docs" / "evidence.md")
    assert "(../results/invented.svg)" in page


def test_one_seed_has_effects_without_intervals_and_no_verdict(tmp_path):
    page = to_markdown([concluded(QUICK)], tmp_path, tmp_path / "evidence.md")
    assert "| **no verdict** | one: 1, open |" in page
    assert "**No verdict**: no verdict from the quick profile" not in page
    assert "**No verdict**: the quick profile, 1 seed." in page


class Seen(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


def test_the_html_page_stands_alone(full):
    page = to_html([full], [to_svg(full.claim().figure(full.results))])
    seen = Seen()
    seen.feed(page)
    text = re.sub(r"\s+", " ", " ".join(seen.text))
    assert "Depends" in text
    assert "two: 2 points [2, 2], fails" in text
    assert "added | measured" in text
    assert "script" not in seen.tags
    links = [value for name, value in seen.attributes if name in ("src", "href")]
    assert links[0] == "#invented"
    assert all(link.startswith(("#", "data:image/svg+xml;base64,")) for link in links)
    ids = [value for name, value in seen.attributes if name == "id"]
    assert "invented" in ids


def test_a_record_of_another_experiment_is_named_so(full, tmp_path):
    full.record.fingerprint, kept = "0" * 12, full.record.fingerprint
    try:
        page = to_markdown([conclude(full.claim, full.record)], tmp_path, tmp_path / "evidence.md")
    finally:
        full.record.fingerprint = kept
    assert "The experiment has been changed since this run." in page


def test_two_measures_of_one_setting_are_told_apart(full):
    twice = replace(full, judgements=(full.judgements[0], full.judgements[0]))
    assert twice.reason() == "holds for " + " · ".join(["one (added | measured)"] * 2)
