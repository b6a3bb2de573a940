"""The explorer in a real browser: what is moved moves the numbers, and what is saved is what is shown."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tenfold.allocation import Override
from tenfold.explorer import Explorer, Query
from tenfold.records import Plan
from tests.browser import Browser, chromium
from tests.explorer.nets import Made
from tests.explorer.served import Client, served

READY = "document.querySelector('#curve svg') && !document.body.hasAttribute('aria-busy')"
MACS = "document.querySelector('[data-tile=macs] .note').textContent"
DISTORTION = "document.querySelector('[data-tile=distortion] .change').textContent"
ROW = "document.querySelectorAll('#layer-table tbody tr')[{}]"


@pytest.fixture(scope="module")
def explorer() -> Explorer:
    return Made().explorer()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium") / "profile") as found:
        yield found


@pytest.fixture
def client(explorer: Explorer, tmp_path: Path) -> Iterator[Client]:
    with served(explorer, tmp_path / "explored.yaml") as found:
        yield found


@pytest.fixture
def page(browser: Browser, client: Client) -> Iterator[Browser]:
    """Yield the browser with the page open; whatever a test does, nothing may go wrong in it."""
    browser.problems.clear()
    browser.media(prefers_color_scheme="light")
    browser.size(1280)
    browser.open(client.address)
    browser.wait(READY)
    yield browser
    assert browser.problems == []
    assert all(address.startswith(client.address) for address in browser.requests)


def moves(page: Browser, selector: str, value: object) -> None:
    """Set an input as a person does, and wait for the answer."""
    element = f"document.querySelector({selector!r})"
    page.run(
        f"e = {element}; e.value = {value!r}; e.dispatchEvent(new Event('input')); e.dispatchEvent(new Event('change'))"
    )
    page.wait(READY)


def distortion(explorer: Explorer, overrides: dict[str, Override] | None = None, **budget: float) -> str:
    query = Query.model_validate({"budget": budget, "overrides": overrides or {}})
    return f"{explorer.select(query).distortion:.3g}"


def test_opens_with_the_plan_that_was_made(page: Browser, client: Client, explorer: Explorer) -> None:
    assert page.requests[0] == client.address
    assert page.run(DISTORTION) == distortion(explorer, macs=0.5)
    assert page.run("document.querySelectorAll('#layer-table tbody tr').length") == len(explorer.table.eligible)
    assert page.run("document.getElementById('range-macs').value") == "50"
    assert page.run("document.querySelector('[data-kind=params] .asked').checked") is False
    assert page.run("document.querySelectorAll('.planned:not(:empty)').length") == 0


def test_a_budget_moves_the_numbers(page: Browser, explorer: Explorer) -> None:
    before = page.run(MACS)
    moves(page, "#range-macs", 40)
    assert page.run(MACS) != before
    assert page.run(DISTORTION) == distortion(explorer, macs=0.4)
    assert page.run("document.getElementById('number-macs').value") == "40"
    moves(page, "#number-params", 30)
    assert page.run("document.querySelector('[data-kind=params] .asked').checked") is True
    assert page.run(DISTORTION) == distortion(explorer, params=0.3, macs=0.4)
    page.click("#reset")
    page.wait(READY)
    assert page.run(DISTORTION) == distortion(explorer, macs=0.5)


def test_an_absolute_limit_is_shown_as_a_share_until_it_is_moved(browser: Browser, tmp_path: Path) -> None:
    explorer = Made().explorer(max_macs=200_000)
    share = 200_000 / explorer.table.before.macs
    with served(explorer, tmp_path / "explored.yaml") as client:
        browser.open(client.address)
        browser.wait(READY)
        assert browser.run(DISTORTION) == distortion(explorer, max_macs=200_000)
        assert browser.run("document.querySelector('[data-kind=macs] .asked').checked") is True
        shown = float(browser.run("document.getElementById('number-macs').value"))
        assert shown == pytest.approx(100 * share, abs=0.01)
        moves(browser, "#range-macs", 50)
        assert browser.run(DISTORTION) == distortion(explorer, macs=0.5)
        browser.click("#reset")
        browser.wait(READY)
        assert browser.run(DISTORTION) == distortion(explorer, max_macs=200_000)
        browser.click("#save")
        browser.wait("document.getElementById('saved').textContent.startsWith('Saved in')")
    assert Plan.load(tmp_path / "explored.yaml").recipe.budget.given == {"max_macs": 200_000}
    assert browser.problems == []


def test_a_budget_moves_with_the_arrow_keys(page: Browser, explorer: Explorer) -> None:
    page.run("document.getElementById('range-macs').focus()")
    page.press("ArrowLeft")
    page.wait(READY)
    assert page.run("document.getElementById('range-macs').value") == "49.5"
    assert page.run(DISTORTION) == distortion(explorer, macs=0.495)


def test_a_layer_that_is_moved_is_pinned(page: Browser, explorer: Explorer) -> None:
    row = ROW.format(1)
    assert page.run(f"{row}.cells[0].textContent").startswith("3")
    assert page.run(f"{row}.querySelector('.pin').checked") is False
    page.run(f"s = {row}.querySelector('.rank'); s.value = 1; s.dispatchEvent(new Event('input'))")
    page.wait(READY)
    assert page.run(f"{row}.querySelector('.pin').checked") is True
    format = page.run(f"{row}.querySelector('.format').value")
    said = page.run(f"{row}.querySelector('output').textContent")
    options = explorer.table.layer("3").of(format)
    named = [" ".join(f"{k}={v}" for k, v in options.rank(i).items()) for i in range(len(options))]
    override = Override(format=format, option=named.index(said))
    assert page.run(DISTORTION) == distortion(explorer, {"3": override}, macs=0.5)
    assert page.run(f"{row}.querySelector('.planned').textContent").startswith("planned: ")
    page.run(f"s = {row}.querySelector('.format'); s.value = ''; s.dispatchEvent(new Event('change'))")
    page.wait(READY)
    assert page.run(f"{row}.querySelector('output').textContent") == "kept"
    assert page.run(DISTORTION) == distortion(explorer, {"3": Override()}, macs=0.5)
    page.click("#release")
    page.wait(READY)
    assert page.run(f"{row}.querySelector('.pin').checked") is False
    assert page.run(DISTORTION) == distortion(explorer, macs=0.5)


def test_all_pinned_one_moves_alone(page: Browser) -> None:
    shown = f"Array.from({ROW.format(0)}.parentNode.rows, r => r.querySelector('output').textContent)"
    page.click("#hold")
    page.wait(READY)
    before = page.run(shown)
    page.run(f"s = {ROW.format(2)}.querySelector('.rank'); s.value = s.max; s.dispatchEvent(new Event('input'))")
    page.wait(READY)
    after = page.run(shown)
    assert [i for i, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1]] == [2]
    assert "more than asked for" in page.run("document.querySelector('[data-kind=macs] .now').textContent")


def test_save_writes_what_is_shown(page: Browser, client: Client, explorer: Explorer) -> None:
    moves(page, "#range-macs", 45)
    page.click("#save")
    page.wait("document.getElementById('saved').textContent.startsWith('Saved in')")
    plan = Plan.load(client.service.out)
    assert plan == explorer.plan(Query.model_validate({"budget": {"macs": 0.45}}))
    assert str(client.service.out) in page.run("document.querySelector('#saved code').textContent")
    moves(page, "#range-macs", 50)
    assert page.run("document.getElementById('saved').textContent") == "Not saved yet."


def test_what_cannot_be_met_is_told_and_taken_back(page: Browser, explorer: Explorer) -> None:
    row = ROW.format(1)
    page.run(f"s = {row}.querySelector('.rank'); s.value = s.max; s.dispatchEvent(new Event('input'))")
    page.wait(READY)
    moves(page, "#range-macs", 20)
    assert "is the least that can be reached" in page.run("document.querySelector('.problem').textContent")
    assert page.run("document.querySelector('.problem').hidden") is False
    assert page.run(DISTORTION) == distortion(explorer, {"3": Override()}, macs=0.5)  # as it was before
    moves(page, "#range-macs", 60)
    assert page.run("document.querySelector('.problem').hidden") is True


def test_sorts_and_narrows_down(page: Browser) -> None:
    head = "#layer-table th.n:nth-last-child(1) button"
    page.click(head)
    values = page.run("Array.from(document.querySelectorAll('[data-cell=distortion]'), c => Number(c.dataset.value))")
    assert values == sorted(values, reverse=True)
    page.run("s = document.getElementById('kind'); s.value = 'pinned'; s.dispatchEvent(new Event('change'))")
    assert page.run("document.querySelectorAll('#layer-table tbody tr:not([hidden])').length") == 0


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_everything_has_a_name_and_contrast(page: Browser, theme: str) -> None:
    from tests.reporting.test_browser import CONTRAST

    page.media(prefers_color_scheme=theme)
    assert page.run(CONTRAST) == []
    unnamed = page.run(
        "Array.from(document.querySelectorAll('button, input, select, svg[role=img], section, [role=region]'))"
        ".filter(e => !(e.textContent.trim() || e.getAttribute('aria-label') || (e.labels && e.labels.length)))"
        ".map(e => e.outerHTML)"
    )
    assert unnamed == []


def test_fits_a_phone(page: Browser) -> None:
    page.size(390, 844, mobile=True)
    assert page.run("document.documentElement.scrollWidth") == 390
    covered = """Array.from(document.querySelectorAll('input[type=range]')).filter(e => {
      e.scrollIntoView({ block: 'end', behavior: 'instant' });
      const b = e.getBoundingClientRect();
      return document.elementFromPoint(b.x + b.width / 2, b.y + b.height / 2) !== e; }).length"""
    assert page.run(covered) == 0
    box = page.run(f"{ROW.format(0)}.querySelector('.rank').getBoundingClientRect().toJSON()")
    assert box["x"] >= 0
    assert box["right"] <= 390
