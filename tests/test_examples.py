"""Every example runs as a user would run it: as a script, in an empty folder; a notebook cell by cell."""

from __future__ import annotations

import difflib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.notebook import Outputs, cells, run

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
# Is run, and its output compared, as the page that it is, block by block: tests/test_docs.py, tests/test_doc_pages.py.
ELSEWHERE = ROOT / "examples" / "newcomer.py"
LIMIT_SECONDS = 60  # an example is read and tried, not waited for


@pytest.mark.parametrize("script", [s for s in EXAMPLES if s != ELSEWHERE], ids=lambda script: script.name)
def test_example_runs(script: Path, tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=environment,
        timeout=LIMIT_SECONDS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.name)
def test_example_says_what_it_shows(script: Path) -> None:
    first = script.read_text(encoding="utf-8").lstrip().splitlines()[0]
    assert first.startswith('"""')


def words(outputs: Outputs, kind: str) -> list[str]:
    """Return what a cell shows without its numbers, which may be others on another machine."""
    texts = [out.get("text", []) if kind == "stdout" else out.get("data", {}).get(kind, []) for out in outputs]
    return re.sub(r"[\d.,]+", "0", "".join("".join(text) for text in texts)).split()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.name)
def test_notebook_shows_what_is_stored_in_it(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a network is faster, a busy machine may not say: words may differ a little."""
    monkeypatch.chdir(tmp_path)
    kinds = set()
    for cell, shown in zip(cells(notebook), run(notebook), strict=True):
        for kind in ("stdout", "text/plain", "text/html"):
            stored, now = words(cell["outputs"], kind), words(shown, kind)
            assert difflib.SequenceMatcher(None, stored, now).ratio() > 0.75, (stored, now)
            kinds |= {kind} if stored else set()
    assert kinds == {"stdout", "text/plain", "text/html"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.name)
def test_links_of_a_notebook_lead_somewhere(notebook: Path) -> None:
    text = notebook.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)", text)
    assert links
    assert [link for link in links if not (notebook.parent / link).exists()] == []
