"""report and compare, through the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.reporting import runs

Run = Callable[..., Any]


def test_compress_then_report(tenfold: Run, tiny: str) -> None:
    """Everything that a report draws is there after an ordinary compression."""
    done = tenfold("compress", "--task", tiny, "--budget", "macs=0.5", "--no-tune", "--no-latency", "--out", "small")
    assert done.code == 0, done.err
    assert Path("small/analysis.json").is_file()
    found = tenfold("report", "small", "--json").json
    assert found["out"] == "small/report.html"
    text = Path("small/report.html").read_text(encoding="utf-8")
    assert found["bytes"] == len(text.encode())
    assert 'id="pick"' in text  # spectra of factorized layers
    assert "tenfold compress --task" in text
    again = tenfold("compress", "--task", tiny, "--budget", "macs=0.5", "--no-tune", "--no-latency", "--out", "small")
    assert again.code == 0, again.err  # a report in the folder does not make it a foreign one


def test_report_elsewhere_and_of_a_record(tenfold: Run, tmp_path: Path) -> None:
    folder = runs.write(tmp_path / "half")
    assert "Written to pages/one.html" in tenfold("report", folder / "record.json", "--out", "pages/one.html").out
    assert Path("pages/one.html").is_file()


def test_report_of_nothing(tenfold: Run, tmp_path: Path) -> None:
    assert tenfold("report", "nowhere").is_error("nowhere", "cannot read")
    assert tenfold("report", tmp_path).is_error("record.json")


def test_compare(tenfold: Run, tmp_path: Path) -> None:
    folders = [runs.write(tmp_path / f"seed{i}", task="net", seed=i) for i in range(2)]
    done = tenfold("compare", *folders, "--out", "c.html", "--out", "c.csv", "--out", "c.tex")
    assert done.code == 0, done.err
    assert "net" in done.out
    assert Path("c.csv").read_text(encoding="utf-8").count("\n") == 2
    assert "\\toprule" in Path("c.tex").read_text(encoding="utf-8")
    assert "2 runs compared" in Path("c.html").read_text(encoding="utf-8")
    (group,) = json.loads(tenfold("compare", *folders, "--json").out)
    assert (group["seeds"], group["runs"], group["values"]["score"]["sd"]) == ([0, 1], ["seed0", "seed1"], 0.0)
    assert tenfold("compare", *folders, "--out", "c.xlsx").is_error("c.xlsx", ".html, .csv, .tex", code=2)
