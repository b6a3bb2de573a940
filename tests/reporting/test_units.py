"""Reports, tables and cards say which layers became narrower together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import tenfold
from tenfold.pipeline import Compressed
from tenfold.reporting import render_record
from tenfold.reporting.page_tables import layer_table
from tenfold.reporting.report import write_report
from tenfold.reporting.run_files import read_run
from tenfold.runtime import Runtime


@pytest.fixture(scope="module")
def made() -> Compressed:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16), nn.Linear(16, 8)).eval()
    data = torch.randn(200, 16)
    return tenfold.compress(net, data[:1], "params=0.6", data=data, runtime=Runtime(measure=False))


def test_tables_name_the_unit_and_not_the_layers_twice(made: Compressed) -> None:
    (unit,) = made.plan.narrowed
    text = render_record(made.record)
    assert unit.words in text
    assert "Narrowed: 1 unit" in text
    assert "tucker1" not in text
    columns, rows = layer_table(made.record, None)
    place = [column.name for column in columns].index("now")
    shown = {row.cells[0].text: row.cells[place] for row in rows}
    assert [shown[path].text for path in unit.members] == ["narrower", "narrower"]


def test_reports_and_cards_of_saved_models(made: Compressed, tmp_path: Path) -> None:
    (unit,) = made.plan.narrowed
    folder = made.save(tmp_path / "saved")
    assert f"| {unit.kind} | `0`, `2` | {unit.words} |" in (folder / "README.md").read_text()
    page = write_report(read_run(folder), tmp_path / "report.html").read_text()
    assert "1 unit narrowed" in page
    assert "factorized or narrower" in page
