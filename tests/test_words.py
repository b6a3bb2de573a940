"""One word for one thing: words that the field does not know, and that were replaced, do not come back."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tenfold"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = sorted((PACKAGE / "reporting" / "page").glob("*.html"))
READ = [*DOCUMENTS, *PAGES, *sorted(PACKAGE.rglob("*.py"))]

# What was said, and the word of the field that is said instead. The search is for whole words.
RETIRED = {
    r"damages?|damaging": "distortion (of a network); damaged is for files",
    r"mind(s|ed)?": "sensitivity, output Gram matrix",
    r"reckon(s|ed|ing)?": "compute, convert",
    r"ledgers?": "accounts, limits",
    r"wish(es)?": "query, request",
    r"knobs?": "threshold",
    r"undecided": "eligible",
    r"anew": "again",
    r"begun": "start, started",
    r"told": "said, given",
    r"parts_als|apply_in_order|use_data|fold_batchnorm|open_for_plan|close_idle|plan_fast": "their new names",
    r"never_slower": "keep_slower_layers_dense, gate",
    r"aware_algorithm": "data_aware_algorithm",
    r"stage_charts?": "lookup table, measurement grid",
    r"holds? no batch": "no calibration batches",
    r"dear": "expensive",
    r"cannot be:": "invalid",
}
PATTERN = re.compile(rf"(?<![\w-])(?:{'|'.join(RETIRED)})(?![\w-])", re.IGNORECASE)


def strings(path: Path) -> list[tuple[int, str]]:
    """Return the texts of a module that users may read, with their lines: docstrings, help and messages."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [(n.lineno, n.value) for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def found_in(path: Path) -> list[str]:
    """Return where a file has a retired word, and which."""
    texts = strings(path) if path.suffix == ".py" else [(1, path.read_text(encoding="utf-8"))]
    return [
        f"{path.relative_to(ROOT)}:{line + text[: match.start()].count(chr(10))}: {match[0]}"
        for line, text in texts
        for match in PATTERN.finditer(text)
    ]


def test_the_search_finds_what_it_is_for() -> None:
    assert PATTERN.search("how much the network minds it")
    assert PATTERN.search("this schedule cannot be: too few")
    assert not PATTERN.search("a reminder of files that are damaged")


@pytest.mark.parametrize("path", READ, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_retired_word_returns(path: Path) -> None:
    assert found_in(path) == [], "\n".join(f"{word}: say {better}" for word, better in RETIRED.items())
