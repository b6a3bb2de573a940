"""Every Python snippet of the documentation runs: those of one page in order, in one namespace, in an empty folder.

Pages of paths are run whole: their Python and their commands become one script, and whatever output they show has to be
what it prints, numbers aside.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from tenfold.allocation import RULES
from tenfold.decompositions import DECOMPOSITIONS
from tenfold.formats import FORMATS
from tenfold.tasks import TASKS
from tenfold.tasks.digits import Digits
from tests.page_script import as_script, shell, without_numbers

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PATHS = [ROOT / "docs" / "tutorials" / f"{name}.md" for name in ("vision", "research", "transformer", "own_model")]
# These run from the built wheel, in tests/test_package.py.
ELSEWHERE = [README, *PATHS]

FENCE = re.compile(
    r"^(?:<!--\s*no-run(?P<reason>.*?)-->\s*\n)?"  # <!-- no-run: the reason -->
    r"(?P<indent>[ \t]*)```python[^\n]*\n(?P<code>.*?)^(?P=indent)```[ \t]*$",
    re.DOTALL | re.MULTILINE,
)
SHOWN = re.compile(r"^```text\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Snippet:
    """A fenced block of Python, the line it starts on, and why it is not run (None: it is run)."""

    code: str
    line: int
    reason: str | None


def snippets(text: str) -> list[Snippet]:
    """Return the Python blocks of a Markdown page."""
    found = []
    for match in FENCE.finditer(text):
        indent, reason = match["indent"], match["reason"]
        code = "".join(line.removeprefix(indent) for line in match["code"].splitlines(keepends=True))
        line = text.count("\n", 0, match.start("code"))
        found.append(Snippet(code, line, None if reason is None else reason.strip(" :")))
    return found


def run(page: Path, blocks: list[Snippet]) -> dict[str, object]:
    """Run the blocks in order in one namespace; errors point at the line of the page."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        if block.reason is None:
            exec(compile("\n" * block.line + block.code, str(page), "exec"), namespace)  # noqa: S102
    return namespace


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget after the test what a page registers: it is the reader's own."""
    for registry in (FORMATS, DECOMPOSITIONS, RULES, TASKS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page not in ELSEWHERE], ids=lambda page: str(page.relative_to(ROOT))
)
def test_snippets_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    text = page.read_text(encoding="utf-8")
    blocks = snippets(text)
    if 'load_task("digits")' in text and ".dense()" in text:  # the same weights as if they were trained here once more
        weights = request.getfixturevalue("trained_digits")
        monkeypatch.setattr(Digits, "pretrained", lambda task: task.dense(weights))
    assert [block.line for block in blocks if block.reason == ""] == [], "no-run needs a reason"
    monkeypatch.chdir(tmp_path)
    run(page, blocks)


@pytest.mark.parametrize("page", PATHS, ids=lambda page: page.stem)
def test_a_path_says_how_long_it_takes_and_shows_what_comes_of_it(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert re.search(r"^\*\*Time to first result:\*\* ", text, re.MULTILINE)
    assert SHOWN.search(text)
    assert f"]({page.relative_to(ROOT)})" in README.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_nothing_is_installed_from_an_index_that_does_not_hold_it(page: Path) -> None:
    assert re.findall(r"pip install [^\n`]*?'?tenfold\b", page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_block_hides_from_the_collector(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    opened = re.findall(r"^[ \t]*(?:`{3,}|~{3,})[ \t]*\{?\.?(?:python|py)\b", text, re.MULTILINE | re.IGNORECASE)
    assert len(opened) == len(snippets(text))


PAGE = """\
```python
a = 1
```
<!-- no-run: needs a GPU -->
```python
a = 1 / 0
```
- in a list:

    ```python
    def b():
        return a + 1
    ```

```bash
a = 3
```
<!-- no-run -->
```python
```
"""


def test_the_collector_itself() -> None:
    blocks = snippets(PAGE)
    assert [block.reason for block in blocks] == [None, "needs a GPU", None, ""]
    namespace = run(Path("page.md"), blocks)
    assert (namespace["a"], namespace["b"]()) == (1, 2)  # type: ignore[operator]


def test_a_script_keeps_the_lines_of_its_page() -> None:
    page = PAGE + "```bash\ntenfold --version\n```\n<!-- no-run: needs a network -->\n```bash\ncurl x\n```\n"
    lines, text = as_script(page).splitlines(), page.splitlines()
    assert lines[1] == "a = 1"
    assert lines[text.index("tenfold --version")] == "tenfold --version"
    assert lines[text.index("tenfold --version") - 1] == '_shell(r"""'
    assert "curl x" not in lines


@pytest.mark.parametrize("line", ["curl x", "tenfold list | head", "tenfold compare runs/*"])
def test_a_command_that_needs_a_shell_is_no_command_of_a_path(line: str) -> None:
    with pytest.raises(ValueError, match=re.escape(line)):
        shell(line)


def test_output_is_compared_without_its_numbers() -> None:
    assert without_numbers(" latency   3.55 ms [3.52–3.60]") == without_numbers("latency  41.2 ms [39.9–40.1]")
    assert without_numbers("score 99 %") != without_numbers("scores 99 %")


def test_an_error_points_at_the_page() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        run(Path("page.md"), snippets("text\n\n```python\n1 / 0\n```\n"))
    last = caught.traceback[-1]
    assert (Path(last.path).name, last.lineno + 1) == ("page.md", 4)
