"""The documentation is complete: a page for every method, and a newcomer's page that is the example itself."""

from __future__ import annotations

import inspect
import json
import re
import runpy
import tomllib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
import yaml

import tenfold
from benchmarks.front.plot import SCHEMES, picture
from tenfold import training
from tenfold.allocation import RULES
from tenfold.cli.app import build
from tenfold.decompositions import DECOMPOSITIONS
from tenfold.formats import FORMATS
from tests.test_docs import snippets

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
METHODS = sorted(page for page in (DOCS / "methods").glob("*.md") if page.name != "index.md")
SECTIONS = ["Formula", "Cost", "When to use it", "Measured", "Source"]

# What is public in training without being a method of its own: settings, outcomes, and what methods are made of.
PARTS = re.compile(
    r".*(Config|Result|Record|Progress|Events)|Batches|TrainingFolder|log_likelihood|ranks_plan", re.DOTALL
)


def front_matter(page: Path) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)\n---\n", page.read_text(encoding="utf-8"), re.DOTALL)
    return {} if found is None else yaml.safe_load(found[1])


COMMANDS: dict[str, Any] = dict(typer.main.get_command(build()).commands)  # type: ignore[attr-defined]
COVERED = {name: page for page in METHODS for name in front_matter(page).get("covers", [])}


def own(registry: Any) -> list[str]:
    """Return the names of a registry that the package itself registers, whatever tests and plugins add."""
    return [name for name, entry in registry.items() if entry.__module__.startswith("tenfold.")]


def methods() -> list[str]:
    found = [f"formats/{name}" for name in own(FORMATS)]
    found += [f"decompositions/{name}" for name in own(DECOMPOSITIONS)]
    found += [f"allocation/{name}" for name in own(RULES)]
    return found + [f"training/{name}" for name in training.__all__ if not PARTS.fullmatch(name)]


@pytest.mark.parametrize("name", methods())
def test_every_method_has_a_page(name: str) -> None:
    assert name in COVERED, f"write docs/methods/NAME.md with `covers: [{name}]`, or name it on the page that has it"


@pytest.mark.parametrize("name", sorted(COVERED))
def test_pages_cover_what_is_there(name: str) -> None:
    room, _, entry = name.partition("/")
    registry = {"formats": FORMATS, "decompositions": DECOMPOSITIONS, "allocation": RULES}.get(room)
    if registry is not None and entry in registry.names():
        return
    module = import_module(f"tenfold.{room}")
    assert inspect.isclass(getattr(module, entry)) or callable(getattr(module, entry))


@pytest.mark.parametrize("page", METHODS, ids=lambda page: page.stem)
def test_a_page_says_formula_cost_use_figures_and_source_and_runs(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == SECTIONS
    use, measured, source = (re.split(rf"^## {name}$", text, flags=re.MULTILINE)[1] for name in SECTIONS[2:])
    assert "Not for:" in use.partition("## ")[0]
    assert measured.partition("## ")[0].strip()
    assert source.strip()
    runs = [block.code for block in snippets(text) if block.reason is None]
    assert any("assert" in code or "print" in code for code in runs)


def nav() -> set[str]:
    text = re.sub(r"!!\S+", "", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def pages(value: Any) -> set[str]:
        if isinstance(value, str):
            return {value}
        return set().union(*(pages(v) for v in (value.values() if isinstance(value, dict) else value)))

    return pages(yaml.safe_load(text)["nav"])


def test_the_site_leads_to_every_page() -> None:
    there = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert nav() == there
    listed = re.findall(r"\]\((\w+\.md)\)", (DOCS / "methods" / "index.md").read_text(encoding="utf-8"))
    assert sorted(listed) == [page.name for page in METHODS]


def test_the_first_page_names_every_extra_and_every_page() -> None:
    text = (DOCS / "index.md").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    assert set(extras) == {name for row in rows for name in re.findall(r"`(\w+)`", row) if name in extras}
    pages = {page.name for page in DOCS.glob("*.md")} - {"index.md"}
    assert {page for page in pages if f"]({page})" not in text} == set()


def test_the_first_tutorial_is_the_newcomers_example() -> None:
    script = (ROOT / "examples" / "newcomer.py").read_text(encoding="utf-8").split('"""\n', 1)[1]
    page = snippets((DOCS / "tutorials" / "own_model.md").read_text(encoding="utf-8"))
    blocks = [line for block in page for line in block.code.splitlines() if line]
    assert blocks == [line for line in script.splitlines() if line]


def test_adding_a_format_a_rule_or_a_task_is_shown_by_an_example() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^### (.*?)\n(.*?)(?=^##)", text, re.DOTALL | re.MULTILINE))
    shown = {
        title: re.findall(r"`examples/(\w+)\.py`", sections[title]) for title in ("A format", "A rank rule", "A task")
    }
    assert shown == {"A format": ["kronecker"], "A rank rule": ["own_rule"], "A task": ["own_task"]}


def test_command_lines_name_options_that_exist() -> None:
    known = {n: {o for p in command.params for o in (*p.opts, *p.secondary_opts)} for n, command in COMMANDS.items()}
    wrong = []
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md"), *(ROOT / "examples").glob("*.py")):
        text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
        for name, rest in re.findall(r"\btenfold +([a-z]+)\b([^`#|\n]*)", text):
            options = re.findall(r"(?<=\s)--?[a-z][\w-]*", rest)
            wrong += [f"{page.name}: {name} {o}" for o in options if name in known and o not in known[name]]
    assert wrong == []


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_of_the_front_pages_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\((?!\w+:)([^)#\s]+)", (ROOT / name).read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_rank_is_chosen_four_files_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    way = ("tenfold/pipeline.py", "tenfold/planning/decide.py", "tenfold/allocation/rules/global_budget.py")
    assert [path for path in way if f"]({path})" not in text] == []
    assert "best = solve(" in (ROOT / way[-1]).read_text(encoding="utf-8")


def test_the_site_shows_every_result_that_is_committed() -> None:
    expand = runpy.run_path(str(DOCS / "hooks.py"))["on_page_markdown"]
    page = expand((DOCS / "results.md").read_text(encoding="utf-8"))
    for result in (ROOT / "benchmarks" / "results").glob("*.md"):
        rows = re.findall(r"^\|.*[0-9].*\|$", result.read_text(encoding="utf-8"), re.MULTILINE)
        assert rows, result
        assert rows[-1] in page, f"the results page does not show {result.name}"
    assert "](../benchmarks" not in page


def test_a_result_without_a_section_gets_one(tmp_path: Path) -> None:
    hooks = runpy.run_path(str(DOCS / "hooks.py"))
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "new.md").write_text("# News\n\n| a |\n| --- |\n| 1.5 |\n")
    hooks["on_page_markdown"].__globals__["ROOT"] = tmp_path
    page = hooks["on_page_markdown"]("<!-- results -->\n\n<!-- other results -->\n")
    assert "| [News](#new) |" in page
    assert '<a id="new"></a>\n\n## News' in page
    assert "| 1.5 |" in page


def test_results_are_questions_with_the_claim_first_and_the_command_last() -> None:
    hooks = runpy.run_path(str(DOCS / "hooks.py"))
    text = (DOCS / "results.md").read_text(encoding="utf-8").replace("<!-- other results -->", "")
    sections = list(hooks["SECTION"].finditer(text))
    assert [s["question"] for s in sections if s["id"] and not s["question"].endswith("?")] == []
    assert [s["question"] for s in sections if s["id"] and not hooks["claim"](s["text"])] == []
    assert [s["question"] for s in sections if s["id"] and not s["text"].rstrip().endswith("```")] == []
    assert sum(bool(s["id"]) for s in sections) >= 28
    assert "| [Does a killed run in stages end the same?](#stages) | Yes: killed at ten random" in hooks["index"](text)


def test_the_picture_of_the_readme_is_that_of_the_committed_results() -> None:
    for scheme in SCHEMES:
        assert (DOCS / "images" / f"front-{scheme}.svg").read_text(encoding="utf-8") == picture(scheme)


def test_the_figures_of_the_readme_are_committed() -> None:
    """The first screen names one network, and the speed and accuracy that its results have."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "runtimes.json").read_text(encoding="utf-8"))["accuracy"]
    found = max((row for row in rows if row["network"] == "resnet56"), key=lambda row: row["speedup"]["ratio"])
    speed, text = found["speedup"], " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"**{speed['ratio']:.2f} times as fast in ONNX Runtime at {found['score']:.2%}**".replace("%", " %") in text
    assert f"95 % interval {speed['low']:.2f} to {speed['high']:.2f}" in text


def test_every_room_is_on_a_page_of_the_reference() -> None:
    documented = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    rooms = {path.parent.name for path in (ROOT / "tenfold").glob("*/__init__.py")} - {
        "cli"
    }  # the commands: docs/cli.md
    assert {room for room in rooms if f"\n::: tenfold.{room}" not in documented} == set()


def test_formulas_are_typeset_without_scripts() -> None:
    typeset = runpy.run_path(str(DOCS / "formulas.py"))["on_page_markdown"]
    page = typeset("Text\n\n$$\n\\lVert W - \\hat W \\rVert \\le 1\n$$\n\n`$$`\n")
    assert page.startswith('Text\n\n<div class="formula"><math ')
    assert "<mo>&#x02264;</mo>" in page
    assert page.endswith("</div>\n\n`$$`\n")
    for path in METHODS:
        assert "\\" not in re.sub(r"<[^>]*>", "", "".join(re.findall(r"<math.*?</math>", typeset(path.read_text()))))


def test_the_site_names_the_version() -> None:
    config = runpy.run_path(str(DOCS / "hooks.py"))["on_config"](SimpleNamespace())
    assert config.site_name == f"tenfold {tenfold.__version__}"
