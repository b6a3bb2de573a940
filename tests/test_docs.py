"""Every Python snippet of the documentation runs: those of one page in order, in one namespace, in an empty folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from tenfold.allocation import RULES
from tenfold.decompositions import DECOMPOSITIONS
from tenfold.formats import FORMATS
from tenfold.tasks import TASKS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Runs as examples/newcomer.py, of which tests/test_doc_pages.py knows that it is the same.
AS_EXAMPLE = ROOT / "docs" / "tutorials" / "own_model.md"

FENCE = re.compile(
    r"^(?:<!--\s*no-run(?P<reason>.*?)-->\s*\n)?"  # <!-- no-run: the reason -->
    r"(?P<indent>[ \t]*)```python[^\n]*\n(?P<code>.*?)^(?P=indent)```[ \t]*$",
    re.DOTALL | re.MULTILINE,
)


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
    "page", [page for page in PAGES if page != AS_EXAMPLE], ids=lambda page: str(page.relative_to(ROOT))
)
def test_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = snippets(page.read_text(encoding="utf-8"))
    assert [block.line for block in blocks if block.reason == ""] == [], "no-run needs a reason"
    monkeypatch.chdir(tmp_path)
    run(page, blocks)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_block_hides_from_the_collector(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    opened = re.findall(r"^\s*(?:`{3,}|~{3,})\s*\{?\.?(?:python|py)\b", text, re.MULTILINE | re.IGNORECASE)
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


def test_an_error_points_at_the_page() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        run(Path("page.md"), snippets("text\n\n```python\n1 / 0\n```\n"))
    last = caught.traceback[-1]
    assert (Path(last.path).name, last.lineno + 1) == ("page.md", 4)
