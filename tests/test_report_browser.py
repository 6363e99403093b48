"""The HTML report in a real browser: what it looks like, asks for, and says to who cannot see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from batchnorm.report import to_html
from browser import EXECUTABLE, Browser
from reports import FAILED, HOSTILE, WARNED, hostile, measured, report

pytestmark = pytest.mark.skipif(
    EXECUTABLE is None, reason="no Chromium here; `make browser` installs it"
)

REPORTS = {
    "nothing": report(),
    "findings": report(FAILED, WARNED),
    "one layer": measured(1),
    "seven layers": measured(7),
    "sixteen layers": measured(16),
    "200 layers": measured(200),
    "hostile": hostile(),
}
Show = Callable[..., Browser]


@pytest.fixture(scope="module")
def show(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Show]:
    """Opens one of `REPORTS`; a browser and a profile for these tests alone."""
    folder = tmp_path_factory.mktemp("pages")

    def opened(
        name: str, width: int = 1280, *, dark: bool = False, unfold: bool = False
    ) -> Browser:
        path: Path = folder / f"{name}.html"
        if not path.exists():
            path.write_text(to_html(REPORTS[name]), encoding="utf-8")
        browser.open(path, width, dark=dark)
        if unfold:
            browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
        return browser

    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield opened


# What is drawn where

# what reaches out of the page, unless a box around it scrolls
OUTSIDE = """
[...document.querySelectorAll('body *')].filter(e => {
  const r = e.getBoundingClientRect();
  const inBox = e.closest('.plot, .scroll, pre');
  const box = inBox && inBox !== e ? inBox.getBoundingClientRect() : null;
  if (e.matches('.skip, .unseen') || !r.width || box) return false;
  return r.left < -0.5 || r.right > innerWidth + 0.5;
}).map(e => e.outerHTML.slice(0, 100))
"""
# what of a drawing is cut off by its box, where the box does not scroll
CUT = """
[...document.querySelectorAll('.plot:not([tabindex])')].flatMap(box => {
  const b = box.getBoundingClientRect();
  const cut = [...box.querySelectorAll('text, circle, .bad')].filter(e => {
    const r = e.getBoundingClientRect();
    return r.left < b.left - 1 || r.right > b.right + 1 || r.bottom > b.bottom + 1;
  }).map(e => e.outerHTML.slice(0, 100));
  return box.scrollWidth > box.clientWidth + 1 ? [...cut, 'scrolls: ' + box.scrollWidth] : cut;
})
"""
# upright words of one drawing that touch, and blocks of the page that do
TOUCHING = """
(() => {
  const touch = (a, b) => a.left < b.right - 1 && b.left < a.right - 1
    && a.top < b.bottom - 1 && b.top < a.bottom - 1;
  const pairs = [];
  const check = (elements) => {
    const boxes = elements.map(e => [e, e.getBoundingClientRect()]).filter(x => x[1].width);
    boxes.forEach(([e, r], i) => boxes.slice(i + 1).forEach(([f, s]) => {
      if (touch(r, s)) pairs.push(e.outerHTML.slice(0, 80) + ' | ' + f.outerHTML.slice(0, 80));
    }));
  };
  document.querySelectorAll('.plot').forEach(
    p => check([...p.querySelectorAll('text:not([transform])')]));
  check([...document.querySelectorAll('.card')]);
  document.querySelectorAll('.card:not(p), header, main, .charts, .found > li, .key, .facts')
    .forEach(e => check([...e.children].filter(c => !c.matches('script, .skip'))));
  return pairs;
})()
"""


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("name", REPORTS)
def test_everything_fits_and_nothing_touches(show, name, width):
    page = show(name, width)
    for _ in range(2):
        assert page.run("document.documentElement.scrollWidth") <= width
        assert page.run(OUTSIDE) == []
        assert page.run(CUT) == []
        assert page.run(TOUCHING) == []
        page.run("document.querySelectorAll('details').forEach(d => d.open = true)")


def test_wide_drawings_scroll_in_their_own_box(show):
    page = show("200 layers", 360)
    boxes = "[...document.querySelectorAll('.plot[tabindex]')]"
    assert page.run(f"{boxes}.length") == 5
    assert page.run(f"{boxes}.every(b => b.scrollWidth > b.clientWidth)")
    page = show("200 layers", 1280)
    assert page.run(f"{boxes}.every(b => b.scrollWidth <= b.clientWidth)")


# What it asks for


@pytest.mark.parametrize("name", ["seven layers", "hostile"])
def test_nothing_is_run_asked_for_or_complained_about(show, name):
    page = show(name, unfold=True)
    events = page.events
    asked = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert asked
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"}
    assert sum(url.startswith("file:") for url in asked) == 1
    said = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    assert [event for event in events if event["method"] in said] == []
    assert page.run("document.title").startswith("batchnorm report")
    assert page.run("document.querySelectorAll('script, img, iframe, h1 + h1').length") == 0


def test_the_policy_would_stop_what_got_in(show):
    page = show("seven layers")
    page.run(
        "document.body.append(Object.assign(document.createElement('script'),"
        "{textContent: 'document.title = 1'}),"
        "Object.assign(new Image(), {src: 'http://example.org/x.png'}))"
    )
    assert page.run("document.title").startswith("batchnorm report")
    page.run("new Promise(r => setTimeout(r, 50))")
    refused = [e["params"]["entry"]["text"] for e in page.events if e["method"] == "Log.entryAdded"]
    assert len(refused) == 2
    assert all("Content Security Policy" in text for text in refused)


def test_what_was_named_by_strangers_can_be_read(show):
    page = show("hostile", unfold=True)
    text = page.run("document.body.textContent")
    for odd in filter(str.isprintable, HOSTILE):
        assert odd in text
    assert "abc\\u202edef" in text


# Colours

# the WCAG's contrast of every visible text with what is painted behind it
CONTRASTS = """
(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
  const paint = (...colors) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const c of colors) { canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = rgb => {
    const [r, g, b] = rgb.slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = e => {
    const layers = [];
    for (let p = e; p; p = p.parentElement) layers.unshift(getComputedStyle(p).backgroundColor);
    return layers;
  };
  const ratio = (color, e) => {
    const back = behind(e);
    const [a, b] = [light(paint(...back, color)), light(paint(...back))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  };
  const found = {};
  const note = (kind, e, color) => {
    const key = kind + ' ' + color + ' ' + behind(e).join();
    if (!(key in found)) found[key] = [kind, ratio(color, e), e.outerHTML.slice(0, 80)];
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const e = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !e.checkVisibility()) continue;
    if (e.closest('title, desc')) continue;
    const style = getComputedStyle(e);
    note('text', e, e.ownerSVGElement ? style.fill : style.color);
  }
  for (const [kind, property] of [['.dot', 'fill'], ['.bad', 'stroke'], ['.column', 'stroke'],
      ['.box', 'stroke'], ['.gradient', 'stroke'], ['.limit', 'stroke'], ['.mark', 'fill'],
      ['.error-bar', 'stroke'], ['.all', 'stroke'], ['.axis', 'stroke'], ['.train', 'fill'],
      ['.eval', 'stroke'], ['.mode.silent', 'stroke'], ['.stripe', 'stroke']])
    for (const e of document.querySelectorAll(kind))
      note('drawing', e, getComputedStyle(e)[property]);
  return Object.values(found);
})()
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_contrast_is_enough(show, dark):
    page = show("seven layers", dark=dark, unfold=True)
    back = page.run("getComputedStyle(document.body).backgroundColor")
    red = int(back.removeprefix("rgb(").partition(",")[0])
    assert red < 64 if dark else red > 192
    measured_contrasts = page.run(CONTRASTS)
    texts = [found for found in measured_contrasts if found[0] == "text"]
    drawings = [found for found in measured_contrasts if found[0] == "drawing"]
    assert len(texts) >= 8
    assert len(drawings) >= 10
    assert [found for found in texts if found[1] < 4.5] == []
    assert [found for found in drawings if found[1] < 3] == []


# For who does not see it, or has no mouse


def tree(page: Browser) -> list[dict[str, Any]]:
    """The accessibility tree's nodes: role, name, description."""
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    return [
        {key: node.get(key, {}).get("value", "") for key in ("role", "name", "description")}
        for node in nodes
        if not node["ignored"]
    ]


@pytest.mark.parametrize("name", REPORTS)
def test_headings_are_in_order(show, name):
    levels = show(name, unfold=True).run(
        "[...document.querySelectorAll('h1, h2, h3, h4, h5, h6')].map(h => +h.tagName[1])"
    )
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert levels.count(2) == 4
    assert all(after <= before + 1 for before, after in pairwise(levels))


@pytest.mark.parametrize("name", ["seven layers", "200 layers", "hostile"])
def test_everything_has_a_name(show, name):
    nodes = tree(show(name))
    roles = {node["role"] for node in nodes}
    assert {"banner", "main", "contentinfo", "navigation"} <= roles
    drawings = [node for node in nodes if node["role"] in ("image", "img")]
    assert len(drawings) == 7
    assert all(node["name"] and node["description"] for node in drawings)
    named = [n for n in nodes if n["role"] in ("link", "region", "heading", "DisclosureTriangle")]
    assert [node for node in named if not node["name"].strip()] == []
    regions = [node["name"] for node in nodes if node["role"] == "region"]
    assert len(regions) == len(set(regions))


def test_the_name_of_a_drawing_and_its_words_are_what_it_shows(show):
    nodes = tree(show("seven layers"))
    drawing = next(node for node in nodes if node["role"] in ("image", "img"))
    assert drawing["name"] == "Running mean against the batches’"
    assert drawing["description"].startswith("Harmful above 0.5 σ. Of 7 layers, 1 beyond it")


def test_links_lead_somewhere(show):
    page = show("seven layers")
    lost = "[...document.links].filter(a => !document.getElementById(a.hash.slice(1))).length"
    assert page.run("document.links.length") >= 8
    assert page.run(lost) == 0


def test_the_keyboard_reaches_everything_and_shows_where_it_is(show):
    page = show("seven layers")
    reached = []
    for _ in range(12):
        for kind in ("keyDown", "keyUp"):
            page.call("Input.dispatchKeyEvent", type=kind, key="Tab", windowsVirtualKeyCode=9)
        reached.append(
            page.run(
                "(() => { const e = document.activeElement, s = getComputedStyle(e);"
                "return [e.tagName, e.getBoundingClientRect().top >= 0, s.outlineStyle,"
                "parseFloat(s.outlineWidth)] })()"
            )
        )
    assert [tag for tag, *_ in reached[:5]] == ["A"] * 5
    assert {"PRE", "SUMMARY"} <= {tag for tag, *_ in reached}
    assert all(seen and style == "solid" and width >= 2 for _, seen, style, width in reached)


def test_a_click_selects_a_fix_to_be_copied(show):
    page = show("findings")
    x, y = page.run(
        "(() => { const e = document.querySelectorAll('.fix pre')[1]; e.scrollIntoView();"
        "const r = e.getBoundingClientRect(); return [r.left + 60, r.top + r.height / 2] })()"
    )
    for kind in ("mousePressed", "mouseReleased"):
        page.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
    assert page.run("getSelection().toString().trim()") == WARNED.fix
