"""The pages in a real browser: no error, and everything that can be clicked or pressed does what it says."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tenfold.reporting.comparison import compare
from tenfold.reporting.comparison_page import write_comparison
from tenfold.reporting.report import write_report
from tenfold.reporting.run_files import read_run
from tests.browser import Browser, chromium
from tests.reporting import runs

HEADS = "Array.from(document.querySelectorAll('#layer-table th[aria-sort]'))"
ROWS = "Array.from(document.querySelectorAll('#layer-table tbody tr:not([hidden])'))"
BODY = "getComputedStyle(document.body).backgroundColor"
LIGHT, DARK, PAPER = "rgb(246, 247, 249)", "rgb(15, 18, 23)", "rgb(255, 255, 255)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium") / "profile") as found:
        yield found


@pytest.fixture
def page(browser: Browser, tmp_path: Path) -> Browser:
    """Return the browser with the report of a small run open."""
    file = write_report(read_run(runs.write(tmp_path / "half")), tmp_path / "report.html")
    browser.problems.clear()
    browser.media(prefers_color_scheme="light")
    browser.size(1200)
    browser.open(file)
    return browser


def column(page: Browser, index: int) -> list[str]:
    return list(page.run(f"{ROWS}.map(r => r.cells[{index}].textContent.trim())"))


def test_opens_without_an_error_or_a_request(page: Browser) -> None:
    assert page.problems == []
    assert [address.split(":")[0] for address in page.requests] == ["file"]
    assert page.run("document.querySelectorAll('.plot svg[role=img]').length") == 7
    assert page.run("document.querySelectorAll('.plot:empty').length") == 0


def test_sorts_by_click_and_by_key(page: Browser) -> None:
    page.run("k = document.getElementById('kind'); k.value = 'all'; k.dispatchEvent(new Event('change'))")
    errors = [layer.rel_error for layer in runs.record().plan.layers]
    known = sorted((f"{e:.3f}" for e in errors if e is not None), reverse=True)
    place = page.run(f"{HEADS}.findIndex(h => h.textContent === 'error')")
    head = f"#layer-table th:nth-child({place + 1})"
    page.click(f"{head} button")
    assert page.run(f"document.querySelector('{head}').getAttribute('aria-sort')") == "descending"
    assert column(page, place) == [*known, "—", "—"]  # what was not measured is last,
    page.run(f"document.querySelector('{head} button').focus()")
    page.press("Enter", "\r")
    assert page.run(f"document.querySelector('{head}').getAttribute('aria-sort')") == "ascending"
    assert column(page, place) == [*known[::-1], "—", "—"]  # either way
    page.click("#layer-table th:first-child button")
    assert column(page, 0) == sorted(column(page, 0))
    assert page.run(f"{HEADS}.filter(h => h.getAttribute('aria-sort') !== 'none').length") == 1
    assert page.problems == []


def test_narrows_down(page: Browser) -> None:
    every = [f"layer{i}.{'bn' if i % 3 == 2 else 'conv'}" for i in range(6)]
    assert column(page, 0) == [name for name in every if name.endswith("conv")]  # norms are folded away
    page.run("s = document.getElementById('search'); s.value = 'batch'; s.dispatchEvent(new Event('input'))")
    assert column(page, 0) == ["layer2.bn", "layer5.bn"]  # and found by a search
    page.run("s.value = ''; s.dispatchEvent(new Event('input'))")
    page.run("k = document.getElementById('kind'); k.value = 'all'; k.dispatchEvent(new Event('change'))")
    assert column(page, 0) == every
    page.run("k.value = 'norm'; k.dispatchEvent(new Event('change'))")
    assert column(page, 0) == ["layer2.bn", "layer5.bn"]
    page.run("s.value = 'LAYER5 batch'; s.dispatchEvent(new Event('input'))")
    assert column(page, 0) == ["layer5.bn"]
    assert page.run("document.querySelector('.count').textContent") == "1 of 6 shown"


def test_shows_the_layer_that_is_asked_for(page: Browser) -> None:
    page.click("button.go[data-layer='layer3.conv']")
    assert page.run("document.getElementById('pick').value") == "layer3.conv"
    assert page.run("document.querySelector('.which').textContent").startswith("Conv2d 64→64 3×3 as tucker2 out=27")
    assert page.run("document.activeElement.id") == "pick"
    page.click("#layer .next")
    assert page.run("document.getElementById('pick').value") == "layer4.conv"
    assert page.problems == []


def test_charts_are_read_with_the_arrow_keys(page: Browser) -> None:
    page.run("document.querySelector('[data-chart=costs] svg').focus()")
    page.press("ArrowRight")
    assert page.run("document.querySelector('[data-chart=costs] .tip').textContent").startswith(
        "layer0.conv\nbefore: 37.7"
    )
    assert page.run("document.querySelector('[data-chart=costs] .tip').hidden") is False


def test_light_dark_and_paper(page: Browser) -> None:
    assert page.run(BODY) == LIGHT
    page.click(".theme")
    assert page.run(BODY) == DARK
    page.media("print", prefers_color_scheme="light")
    assert page.run(BODY) == PAPER  # paper is white, whatever was chosen
    assert page.run("getComputedStyle(document.querySelector('.tools')).display") == "none"
    page.media(prefers_color_scheme="dark")
    page.click(".theme")
    assert page.run(BODY) == LIGHT  # the button wins over the system


def test_follows_the_system(page: Browser) -> None:
    page.media(prefers_color_scheme="dark")
    assert page.run(BODY) == DARK


CUT = """(() => {
  const wide = document.documentElement.clientWidth, box = document.querySelector('#layers .scroll');
  const cells = Array.from(document.querySelectorAll('#layer-table tbody tr:not([hidden]) > *'));
  const cut = (b) => b.right > wide || b.left < 0 || b.width < 1;
  const out = cells.filter(c => cut(c.getBoundingClientRect()));
  const why = document.querySelectorAll('#layer-table tbody tr:not([hidden]) td.why').length;
  return [out.length, box.scrollWidth - box.clientWidth, why > 0];
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 800, 1216, 1280])
def test_no_column_of_the_layers_is_cut(browser: Browser, tmp_path: Path, width: int, scheme: str) -> None:
    """Not even with all columns, long names and long reasons: what does not fit beside goes below."""
    record = runs.record()
    long = {
        "path": "encoder.layers.11.attention.output.dense",
        "reason": "the last layer is 0.4% of the cost: too little",
    }
    layers = (record.plan.layers[0].replace(**long), *record.plan.layers[1:])
    run = read_run(runs.write(tmp_path / "long", plan=record.plan.replace(layers=layers)))
    file = write_report(run, tmp_path / "report.html")
    browser.problems.clear()
    browser.media(prefers_color_scheme=scheme)
    browser.size(width, mobile=width < 500)
    browser.open(file)
    assert browser.run(CUT) == [0, 0, True]
    assert browser.run("document.documentElement.scrollWidth") == width
    assert browser.run(CONTRAST) == []
    assert browser.run("document.querySelector('#layer-table thead button').checkVisibility()")  # to sort by
    assert browser.problems == []


def test_fits_a_phone(page: Browser) -> None:
    page.size(390, mobile=True)
    assert page.run("document.documentElement.scrollWidth") == 390


CONTRAST = """(() => {
  const lum = (c) => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
    .map(x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2]; };
  const ground = (e) => { while (e) { const c = getComputedStyle(e).backgroundColor;
    if (c !== 'rgba(0, 0, 0, 0)') return c; e = e.parentElement; } return 'rgb(255, 255, 255)'; };
  const found = [];
  document.querySelectorAll('body *').forEach(e => {
    if (!Array.from(e.childNodes).some(n => n.nodeType === 3 && n.textContent.trim())) return;
    if (!e.checkVisibility() || e.closest('svg, .tip, script')) return;
    const [a, b] = [lum(getComputedStyle(e).color), lum(ground(e))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) found.push(`${e.tagName}.${e.className} ${ratio.toFixed(2)}`);
  });
  return found;
})()"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast_is_enough_to_read(page: Browser, theme: str) -> None:
    """WCAG 2.2, level AA: 4.5 to 1 for text."""
    page.media(prefers_color_scheme=theme)
    assert page.run(CONTRAST) == []


def test_everything_has_a_name(page: Browser) -> None:
    unnamed = page.run(
        "Array.from(document.querySelectorAll('button, input, select, svg[role=img], section, [role=region]'))"
        ".filter(e => !(e.textContent.trim() || e.getAttribute('aria-label') || (e.labels && e.labels.length)))"
        ".map(e => e.outerHTML)"
    )
    assert unnamed == []
    assert page.run("Array.from(document.querySelectorAll('table')).every(t => t.caption)")


def test_a_large_model_opens(browser: Browser, tmp_path: Path) -> None:
    """What that takes is documented, and measured there; the bound is generous, since machines do other things too."""
    file = write_report(read_run(runs.write(tmp_path / "large", layers=300)), tmp_path / "large.html")
    browser.problems.clear()
    start = time.perf_counter()
    browser.open(file)
    assert browser.run("document.querySelectorAll('#layer-table tbody tr').length") == 300
    assert time.perf_counter() - start < 60
    loaded = browser.run("performance.getEntriesByType('navigation')[0].loadEventEnd")
    assert 0 < loaded < 30_000
    assert browser.problems == []


def test_the_comparison_opens_and_sorts(browser: Browser, tmp_path: Path) -> None:
    found = [read_run(runs.write(tmp_path / f"run{i}", seed=i, task=f"net{i % 2}")) for i in range(4)]
    browser.problems.clear()
    browser.open(write_comparison(compare(found), tmp_path / "compare.html"))
    names = "Array.from(document.querySelectorAll('#groups tbody th')).map(c => c.textContent)"
    before = browser.run(names)
    browser.click("#groups th:first-child button")
    browser.click("#groups th:first-child button")
    assert browser.run(names) == sorted(before, reverse=True)
    assert browser.problems == []


CHARTS = "Array.from(document.querySelectorAll('.plot > svg'))"
TICKS = "Array.from(s.querySelectorAll('text:not(.halo)[text-anchor=middle]')).map(t => t.textContent)"
NAMES = "Array.from(s.querySelectorAll('.name')).map(t => t.textContent)"
OVERLAPS = """(() => { const b = Array.from(s.querySelectorAll('.halo')).map(t => t.getBBox());
  return b.flatMap((p, i) => b.slice(i + 1).filter(q => p.x < q.x + q.width && q.x < p.x + p.width
    && p.y < q.y + q.height - 3 && q.y < p.y + p.height - 3)).length; })()"""


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1280, "dark")])
def test_a_comparison_tells_near_values_apart(browser: Browser, tmp_path: Path, width: int, scheme: str) -> None:
    """Ticks that read alike, points that nobody can tell from each other: two runs with nearly the same cost."""
    made = []
    for i, share in enumerate((0.37825, 0.37944)):
        record = runs.record(settings={"way": i})
        after = record.after.replace(macs=round(share * record.before.macs), score=0.9319 - 0.0039 * i)
        made.append(read_run(runs.write(tmp_path / f"run-{i}", **record.replace(after=after).model_dump())))
    browser.problems.clear()
    browser.media(prefers_color_scheme=scheme)
    browser.size(width, mobile=width < 500)
    browser.open(write_comparison(compare(made), tmp_path / "near.html"))
    ticks, names, overlaps = (browser.run(f"{CHARTS}.map(s => {each})") for each in (TICKS, NAMES, OVERLAPS))
    assert all(len(set(texts)) == len(texts) for texts in ticks), ticks
    assert names
    assert all(sorted(own) == ["run-0", "run-1"] for own in names)
    assert set(overlaps) == {0}
    assert browser.run("document.documentElement.scrollWidth") == width
    assert browser.problems == []
