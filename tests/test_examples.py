"""Every example runs as a user would run it: as a script, in an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
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
