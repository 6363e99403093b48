from __future__ import annotations

import dataclasses
import io
import stat
from pathlib import Path

import pytest
from rich.console import Console

from batchnorm.audit import Finding, Report, Severity
from batchnorm.cli.examples import example
from batchnorm.report import FORMS, print_report
from batchnorm.report.files import write_atomically
from reports import FAILED, HOSTILE, WARNED, hostile, of_ranks, report, stale


def printed(it: Report, width: int = 80, **options) -> str:
    file = io.StringIO()
    print_report(it, Console(file=file, width=width, **options))
    return file.getvalue()


# What a report is


def test_a_report_is_clean_where_there_are_only_facts():
    fact = dataclasses.replace(WARNED, severity=Severity.INFO)
    assert report().is_clean
    assert report(fact).is_clean
    assert not report(fact, WARNED).is_clean
    assert not report(FAILED).is_clean


def test_severities_are_ranked_from_the_worst():
    assert sorted(Severity, key=lambda s: s.rank) == ["error", "warning", "info"]


# The terminal


def test_the_terminal_shows_code_severity_place_fix_and_page():
    text = printed(report(FAILED, WARNED))
    lines = text.splitlines()
    assert lines[:2] == ["", "batchnorm watched 3 layers in 7 forward passes: 2 found"]
    assert text.index("BN109 error: one value per channel") < text.index("BN108 warning: ")
    assert lines[-6:] == [
        "BN108 warning: statistics moved with gradients off",
        "  2 layers moved in 3 forward passes",
        "  in   Net.a, Net.b",
        "  at   train.py:12",
        "  fix  call model.eval() before this line",
        "  why  batchnorm rules BN108",
    ]
    assert text.count("  at   ") == 1  # the other has no place


def test_the_terminal_says_that_nothing_was_found_and_who_looked():
    assert printed(report()).splitlines() == [
        "",
        "batchnorm watched 3 layers in 7 forward passes: nothing found by BN103, BN108, BN109",
    ]


def test_the_terminal_says_that_there_was_nothing_to_watch():
    text = printed(report(layers=0))
    assert text.splitlines() == [
        "",
        "batchnorm saw no batch norm layer being called",
        "  functions that are compiled, and other processes, are not seen",
    ]


def test_the_terminal_says_which_rule_was_switched_off_and_why():
    text = printed(report(WARNED, disabled={"BN103": "KeyError: 7"}))
    assert text.splitlines()[-1] == "BN103 was switched off and the run went on: KeyError: 7"


def test_the_terminal_says_what_was_checked():
    checked = dataclasses.replace(report(), subject="model.pt", calls=0)
    assert printed(checked).splitlines()[1] == (
        "batchnorm checked 3 layers of model.pt: nothing found by BN103, BN108, BN109"
    )
    with_batches = dataclasses.replace(checked, calls=7)
    assert "of model.pt in 7 batches: nothing" in printed(with_batches).splitlines()[1]
    empty = dataclasses.replace(report(layers=0), subject="model.pt")
    assert printed(empty).splitlines()[1] == "batchnorm found no batch norm layer in model.pt"


def test_the_terminal_says_which_ranks_have_it_and_how_they_ended():
    text = printed(of_ranks(), width=60)
    assert text.splitlines()[1:4] == [
        "batchnorm watched 3 layers in 7 forward passes on the rank that reports, of 4: 2 found",
        "  ranks 1 and 3 of 4: told to end (SIGTERM), at train.py:31",
        "  rank 2 of 4: exit status 1",
    ]
    assert "  at   train.py:12\n  on   ranks 1–3 of 4\n  fix  call model.eval()" in text
    assert text.count("  on   ") == 1  # all have the other
    checked = dataclasses.replace(of_ranks(), subject="Net", endings=())
    assert "checked 3 layers of Net in 7 batches on each of 4 ranks: 2" in printed(checked)
    idle = dataclasses.replace(of_ranks(), layers=0, endings=())
    assert "saw no batch norm layer being called on each of 4 ranks\n" in printed(idle)


def test_a_rule_that_was_switched_off_has_not_found_nothing():
    first = printed(report(disabled={"BN103": "KeyError: 7"})).splitlines()[1]
    assert first.endswith("nothing found by BN108, BN109")


def test_the_terminal_names_four_layers_and_counts_the_rest():
    names = tuple(f"layer{i}" for i in range(7))
    shown = [printed(report(dataclasses.replace(WARNED, modules=names[:k]))) for k in (4, 5, 7)]
    assert "  in   layer0, layer1, layer2, layer3\n" in shown[0]
    assert "  in   layer0, layer1, layer2, layer3 and 1 more\n" in shown[1]
    assert "  in   layer0, layer1, layer2, layer3 and 3 more\n" in shown[2]


@pytest.mark.parametrize("odd", ["[red]", "[/]", "[/bold]", "[link=x]y", ":smile:", "\\[", "100%"])
@pytest.mark.parametrize("colored", [False, True])
def test_names_that_look_like_markup_are_printed_literally(odd, colored):
    finding = Finding("BN108", Severity.WARNING, f"m {odd} m", (f"Net.{odd}",), odd, f"{odd}.py:1")
    options = {"force_terminal": True, "color_system": "standard"} if colored else {}
    text = printed(report(finding, disabled={"BN103": f"E: {odd}"}), **options)
    assert f"  m {odd} m" in text
    assert f"in   Net.{odd}" in text
    assert f"at   {odd}.py:1" in text
    assert f"fix  {odd}" in text
    assert f"E: {odd}" in text


def test_a_long_place_is_not_broken_so_that_it_can_be_copied():
    place = "/".join(["folder"] * 30) + "/train.py:12"
    assert f"  at   {place}\n" in printed(
        report(dataclasses.replace(WARNED, place=place)), width=40
    )


def test_severities_differ_in_color():
    options = {"force_terminal": True, "color_system": "standard"}
    text = printed(report(FAILED, WARNED), **options)
    red, yellow = "\x1b[1;31m", "\x1b[1;33m"
    assert f"{red}BN109 error" in text
    assert f"{yellow}BN108 warning" in text
    assert "\x1b" not in printed(report(FAILED, WARNED))


def test_a_finding_of_somebody_elses_rule_is_printed_too():
    assert "XY1 warning" in printed(report(dataclasses.replace(WARNED, code="XY1")))


def test_findings_of_one_rule_share_its_head_fix_and_page():
    text = printed(report(WARNED, stale("Net.b", 0.7, 0.1), FAILED, stale("Net.a", 0.9, 0.2)))
    lines = text.splitlines()
    heads = [line for line in lines if line.startswith("BN")]
    assert heads == [
        "BN109 error: one value per channel",
        "BN108 warning: statistics moved with gradients off",
        "BN103 warning: running statistics far from the data's, 2 times",
    ]
    assert lines[-8:] == [
        "  the running mean is off by 0.7 ± 0.02 standard deviations, the running standard "
        "deviation by ×1.1 (± 3%)",
        "  in   Net.b",
        "",
        "  the running mean is off by 0.9 ± 0.02 standard deviations, the running standard "
        "deviation by ×1.2 (± 3%)",
        "  in   Net.a",
        "",
        "  fix  torch.optim.swa_utils.update_bn(loader, model) before evaluating; then a larger "
        "momentum",
        "  why  batchnorm rules BN103",
    ]


def test_findings_of_one_rule_keep_fixes_that_differ():
    other = dataclasses.replace(WARNED, fix="another\nin two lines")
    text = printed(report(WARNED, other))
    assert text.count("  fix  call model.eval() before this line\n") == 1
    assert text.count("  fix  another\n       in two lines\n") == 1
    assert text.count("  why  ") == 1


def test_one_rule_with_two_severities_has_two_heads():
    fact = dataclasses.replace(WARNED, severity=Severity.INFO)
    text = printed(report(fact, WARNED, fact))
    assert text.index("BN108 warning") < text.index("BN108 info")
    assert text.count("\nBN108 ") == 2


def test_the_terminal_says_what_read_the_graph():
    checked = dataclasses.replace(report(), subject="model.py:make", graph="torch.fx")
    assert printed(checked).splitlines()[2] == "  graph read by torch.fx"


def test_nothing_that_a_stranger_named_reaches_the_terminal_as_a_control():
    text = printed(hostile())
    assert text.replace("\n", "").isprintable()
    assert "escape\\x1b[2J" in text
    assert "\n::error::forged" not in text
    assert HOSTILE[-1] in text


# Files


def test_there_is_a_form_for_each_suffix_and_each_can_be_written(tmp_path):
    assert list(FORMS) == [".json", ".sarif", ".html"]
    for suffix, form in FORMS.items():
        for it in (report(), hostile()):
            write_atomically(tmp_path / f"report{suffix}", form(it))


def test_a_file_is_written_as_utf8_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "report.json"
    for text in ("γ·(x − mean)\n", "second\n"):
        write_atomically(path, text)
        assert path.read_bytes() == text.encode()
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_may_be_read_by_whom_any_file_may(tmp_path):
    ordinary, path = tmp_path / "ordinary", tmp_path / "report.json"
    ordinary.write_text("")
    write_atomically(path, "{}")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


@pytest.mark.parametrize("reason", ["text that cannot be encoded", "no room", "no renaming"])
def test_an_existing_file_stays_whole_when_writing_fails(tmp_path, monkeypatch, reason):
    path = tmp_path / "report.json"
    path.write_text("old")
    text = "new"

    def fail(*_, **__):
        raise OSError(reason)

    if reason == "text that cannot be encoded":
        text = "new \ud800"
    elif reason == "no room":
        monkeypatch.setattr(Path, "write_text", fail)
    else:
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises((OSError, UnicodeEncodeError)):
        write_atomically(path, text)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_does_not_appear_when_writing_fails(tmp_path):
    with pytest.raises(UnicodeEncodeError):
        write_atomically(tmp_path / "report.json", "\ud800")
    assert list(tmp_path.iterdir()) == []


def test_the_example_is_found():
    assert "load_digits" in example("digits.py").read_text(encoding="utf-8")
