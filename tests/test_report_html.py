from __future__ import annotations

import dataclasses
import html
import re
from html.parser import HTMLParser

import pytest

from batchnorm.audit import Distance, LayerProfile, Period, Rule, Severity, find_rule
from batchnorm.report import html as page
from batchnorm.report import to_html
from reports import CODES, FAILED, HOSTILE, WARNED, hostile, measured, of_ranks, report, stale


class Elements(HTMLParser):
    """The elements of a page in their order, and its text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        if data.strip():
            self.text.append(data.strip())

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def marks(self, kind: str) -> list[dict[str, str | None]]:
        """Of the charts, without the swatches of their keys."""
        return [a for _, a in self.elements if (a.get("class") or "").split() == [kind]]


def text_of(it) -> str:
    return " ".join(" ".join(Elements(to_html(it)).text).split())


# What it says


def test_findings_stand_worst_first_and_by_rule():
    first, second = stale("Net.b", 0.7, 0.1), stale("Net.a", 0.9, 0.2)
    text = text_of(report(WARNED, first, FAILED, second))
    order = [
        text.index(words)
        for words in (
            "one value per channel",
            "statistics moved with gradients off",
            "running statistics far from the data's",
            first.message,
            second.message,
            "Layers along depth Nothing",
        )
    ]
    assert order == sorted(order)
    assert "2 times" in text
    assert text.count(first.fix) == 1
    assert "1 error 3 warnings 0 facts" in text


def test_a_finding_has_its_modules_numbers_place_and_fix():
    text = text_of(report(WARNED))
    assert (
        "2 layers moved in 3 forward passes In Net.a Net.b At train.py:12 "
        "Measured layers 2 passes 3 Fix call model.eval() before this line" in text
    )


def test_fixes_that_differ_stand_with_their_findings():
    other = dataclasses.replace(WARNED, message="other", fix="another\nin two lines")
    text = text_of(report(WARNED, other))
    assert text.index(WARNED.fix) < text.index("other In") < text.index("another in two lines")


def test_a_guess_is_called_one():
    guess = dataclasses.replace(WARNED, is_guess=True)
    assert "(a guess: it may well be meant)" in text_of(report(guess))
    assert "a guess" not in text_of(report(WARNED))


def test_many_findings_and_modules_are_all_there():
    many = [dataclasses.replace(WARNED, modules=(f"layer{i}",)) for i in range(40)]
    wide = dataclasses.replace(FAILED, modules=tuple(f"wide{i}" for i in range(40)))
    text = text_of(report(*many, wide))
    assert "34 more of BN108" in text
    assert "and 34 more" in text
    for i in range(40):
        assert f"layer{i} " in text
        assert f"wide{i} " in text


def test_the_rules_page_is_in_the_page_once():
    fact = dataclasses.replace(WARNED, severity=Severity.INFO)
    source = to_html(report(WARNED, fact))
    it = Elements(source)
    paragraph = re.search(r"## Why it hurts\n\n(.*?)[`\n]", find_rule("BN108").page())[1]
    assert html.unescape(source).count(paragraph) == 1
    [own] = [a for a in it.of("details") if a.get("class") == "page"]
    links = [a["href"] for a in it.of("a")]
    assert f"#{own['id']}" in links
    assert [tag for tag, _ in it.elements if tag in ("h4", "h5")].count("h4") >= 5


def test_a_rules_page_is_markdown_and_no_html(monkeypatch):
    class Odd(Rule):
        """## What it finds

        <script>alert(1)</script> ![x](http://example.org/x.png) [a](javascript:alert(1)) `1 < 2`
        """

        code, name, looks_at = "BN108", "odd", "nothing"

    monkeypatch.setattr(page, "find_rule", lambda code: Odd)
    source = to_html(report(WARNED))
    it = Elements(source)
    assert not it.of("script")
    assert not it.of("img")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in source
    assert "<code>1 &lt; 2</code>" in source
    assert not [a for a in it.of("a") if "javascript" in (a.get("href") or "")]


def test_nothing_found_is_said_with_who_looked():
    text = text_of(report(disabled={"BN103": "KeyError: 7"}))
    assert "Nothing was found by BN108, BN109." in text
    assert "switched off: KeyError: 7" in text
    assert text.count("nothing found") == 2
    assert "No rule has looked." in text_of(dataclasses.replace(report(), rules=()))


def test_the_subject_and_the_graph_are_named():
    it = dataclasses.replace(report(), subject="model.py:make", graph="torch.fx", calls=0)
    text = text_of(it)
    assert "batchnorm checked 3 layers of model.py:make" in text
    assert "Graph read by torch.fx ." in text
    empty = dataclasses.replace(report(layers=0), subject="model.pt")
    assert "batchnorm found no batch norm layer in model.pt" in text_of(empty)
    assert "Compiled models and other processes are not seen." in text_of(report(layers=0))


def test_ranks_that_have_it_and_how_they_ended():
    text = to_html(of_ranks())
    assert text.count("<dt>On</dt>") == 1
    assert "<dd><bdi>ranks 1–3 of 4</bdi></dd>" in text
    ended = "ranks 1 and 3 of 4: told to end (SIGTERM), at train.py:31"
    assert f'<p class="note"><bdi>{ended}</bdi>.</p>' in text
    assert "Measured on one rank of 4." in to_html(dataclasses.replace(measured(), ranks=4))
    assert "one rank of" not in to_html(measured())


def test_somebody_elses_rule_has_no_page():
    it = Elements(to_html(report(dataclasses.replace(WARNED, code="XY1"))))
    assert "XY1" in it.text
    assert not [a for a in it.of("details") if a.get("class") == "page"]


# What was not measured


def test_what_is_missing_is_said_with_what_to_run():
    text = text_of(report())
    assert "Nothing was measured of the layers at work." in text
    assert "batchnorm check package.module:make_model --data package.module:loader" in text
    assert "Gradients and modes are seen in a training run: batchnorm run train.py ." in text
    assert "No gradient was seen" in text_of(
        dataclasses.replace(report(), timeline=(Period("Net", "eval", 3),))
    )
    gradients = dataclasses.replace(measured(2), timeline=())
    assert "The models’ modes are seen in a training run" in text_of(gradients)


def test_a_chart_without_numbers_is_left_out():
    profile = LayerProfile("a", 4, weight=(0.5,) * 7, dead=0)
    it = Elements(to_html(dataclasses.replace(report(), profiles=(profile, profile))))
    assert [a["aria-labelledby"] for a in it.of("svg") if a.get("role") == "img"] == ["weight-name"]
    text = " ".join(it.text)
    assert text.count("it takes at least four batches of training") == 3
    assert "None of 8 channels in 2 layers is dead" in text


# Charts


def test_what_is_harmful_is_marked_and_named():
    def profile(path, shift, error):
        return LayerProfile(path, 4, distance=Distance(shift, error, 0.1, 0.01))

    # 0.6 − 2 · 0.06 is not above 0.5
    profiles = (profile("a", 0.1, 0.01), profile("b", 0.6, 0.06), profile("c", 0.7, 0.01))
    it = Elements(to_html(dataclasses.replace(report(), profiles=profiles)))
    bad = [a for a in it.marks("bad") if a.get("d", "").startswith("M0")]
    assert len(bad) == 1
    words = "Of 3 layers, 1 beyond it by more than twice the error: c. The largest is 0.7 ± 0.01"
    assert words in " ".join(it.text)
    limits = [a for a in it.marks("limit") if a["x2"] == "100%"]
    assert len(limits) == 2
    dots = [float(a["cy"]) for a in it.marks("dot") if a["cx"].endswith("%")]
    assert dots[0] > float(limits[0]["y1"]) > dots[1]


def test_values_stand_where_the_axis_says():
    profiles = tuple(
        LayerProfile(str(i), 4, distance=Distance(shift, 0.01, 0.0, 0.0))
        for i, shift in enumerate((0.0, 0.35))
    )
    it = Elements(to_html(dataclasses.replace(report(), profiles=profiles)))
    first, second = [a for a in it.marks("dot") if a["cx"].endswith("%")][:2]
    assert (first["cx"], second["cx"]) == ("25.000%", "75.000%")
    assert float(first["cy"]) == 26 + 180
    assert float(second["cy"]) == pytest.approx(
        26 + 180 * (1 - 0.35 / (0.5 * 1.35 * 1.04)), abs=0.01
    )


def test_quantiles_are_drawn_in_three_widths():
    profile = LayerProfile("a", 4, weight=(-1.0, -0.5, 0.25, 0.5, 0.75, 1.0, 2.0))
    it = Elements(to_html(dataclasses.replace(report(), profiles=(profile,))))
    box, most, every = (
        next(a for a in it.marks(kind) if a["x1"].endswith("%")) for kind in ("box", "most", "all")
    )
    lengths = [float(a["y1"]) - float(a["y2"]) for a in (box, most, every)]
    pixel = 180 / (3 * 1.1)  # −1 … 2, and a twentieth of it on both sides
    assert lengths == pytest.approx([0.5 * pixel, 1.5 * pixel, 3 * pixel], abs=0.03)
    widths = [float(a["stroke-width"]) for a in (box, most, every)]
    assert widths == sorted(widths, reverse=True)


def test_every_drawing_has_a_name_words_and_its_numbers():
    it = Elements(to_html(measured()))
    drawings = [a for a in it.of("svg") if a.get("role") == "img"]
    names = [a["aria-labelledby"].removesuffix("-name") for a in drawings]
    assert names == ["shift", "stretch", "noise", "dead", "weight", "gradients", "timeline"]
    ids = [a["id"] for _, a in it.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for a in drawings:
        assert {a["aria-labelledby"], a["aria-describedby"]} <= set(ids)
    assert len(it.of("table")) == len(names) + 1
    text = " ".join(it.text)
    assert "1 · ResidualNetwork.0.norm1 0.08 0.03 no" in text
    for name in ("train", "train without gradients", "eval"):
        assert f"ResidualNetwork {name}" in text or f"Averaged {name}" in text


def test_modes_are_told_apart_and_as_long_as_they_lasted():
    timeline = (Period("Net", "train", 30), Period("Net", "eval", 10), Period("Two", "eval", 20))
    it = Elements(to_html(dataclasses.replace(report(), timeline=timeline)))
    bars = [a for tag, a in it.elements if tag == "rect" and a["width"].endswith("%")]
    assert [(a["class"], a["x"], a["width"]) for a in bars] == [
        ("mode train", "0.000%", "75.000%"),
        ("mode eval", "75.000%", "25.000%"),
        ("mode eval", "0.000%", "50.000%"),
    ]
    assert "Net: train 30 passes, eval 10 passes. Two: eval 20 passes." in " ".join(it.text)


def test_gradients_are_a_line_a_layer():
    it = Elements(to_html(measured(200)))
    lines = [a for a in it.marks("gradient") if a["d"].count("L") > 5]
    assert len(lines) == 200
    assert [lines[0]["style"], lines[-1]["style"]] == ["--depth:0%", "--depth:100%"]
    down = [float(y) for y in re.findall(r" (\S+?)(?:L|$)", lines[0]["d"])]
    assert all(26 <= y <= 206 for y in down)
    assert len(down) == 44


@pytest.mark.parametrize("layers", [1, 2, 7, 16, 17, 200])
def test_any_number_of_layers_can_be_drawn(layers):
    it = Elements(to_html(measured(layers)))
    text = " ".join(it.text)
    assert f"{layers} · " in text
    assert sum(a.get("role") == "img" for a in it.of("svg")) == 7


def test_a_page_of_200_layers_is_not_too_large():
    assert len(to_html(measured(200)).encode()) < 1_500_000


# What a stranger may have named things


def test_strings_from_outside_are_text():
    source = to_html(hostile())
    it = Elements(source)
    assert {tag for tag, _ in it.elements} <= {
        *("html", "head", "meta", "title", "link", "style", "body", "header", "main", "footer"),
        *("section", "article", "nav", "figure", "figcaption", "details", "summary", "div"),
        *("h1", "h2", "h3", "h4", "p", "ul", "li", "dl", "dt", "dd", "a", "b", "bdi", "span"),
        *("code", "pre", "table", "thead", "tbody", "tr", "th", "td", "em", "strong", "ol"),
        *("svg", "path", "line", "circle", "rect", "text", "g", "desc", "defs", "pattern"),
    }
    assert len(it.of("h1")) == 1
    for _, attributes in it.elements:
        assert not [name for name in attributes if name.startswith("on")]
        assert (attributes.get("href") or "#").startswith(("#", "data:,"))
    text = " ".join(it.text)
    for odd in filter(str.isprintable, HOSTILE):
        assert odd in text
    for shown in (r"abc\u202edef\u2066ghi", r"zero\u200bwidth", r"\x1b[2J", r"half\udc80a"):
        assert shown in text
    assert source.replace("\n", "").isprintable()
    source.encode("utf-8")


def test_a_page_asks_nothing_of_anybody():
    it = Elements(to_html(measured()))
    [policy] = [a["content"] for a in it.of("meta") if "http-equiv" in a]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")
    assert not it.of("script")
    assert not [a for _, a in it.elements if "src" in a]
    assert "url(" not in to_html(measured()).replace("url(#hatching)", "")
    assert it.of("html") == [{"lang": "en"}]


def test_the_same_report_is_the_same_page():
    assert to_html(measured()) == to_html(measured())
    assert all(code in to_html(report()) for code in CODES)
