"""OpenVINO: two files that belong together, in the precision of the model, and nobody is told."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tenfold import export
from tenfold.errors import ExportError
from tenfold.exporting import ExportConfig, open_exported
from tenfold.files import atomic_write

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs the extra openvino"),
    pytest.mark.filterwarnings("ignore"),  # those of the exporters, about themselves
]

UNTIMED = ExportConfig(seconds=0)


def _net(width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * width, 5))
    return nn.Sequential(*layers).eval()


def test_weights_stay_in_the_precision_of_the_model(tmp_path: Path) -> None:
    net, path = _net(), tmp_path / "net.xml"
    made = export(net, torch.randn(1, 3, 4, 4), path, to="openvino", config=ExportConfig(seconds=0.02))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.bin", "net.xml"]
    assert made.bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert list(made.parity) == [1, 2, 5]
    assert max(made.parity.values()) < 1e-5  # half precision would be off by 1e-3
    assert "openvino" in made.environment.versions
    x = torch.randn(9, 3, 4, 4)
    torch.testing.assert_close(open_exported(path)(x), net(x), rtol=1e-5, atol=1e-5)


def test_files_that_are_there_are_not_overwritten_unasked(tmp_path: Path) -> None:
    x, path = torch.randn(1, 3, 4, 4), tmp_path / "net.xml"
    with pytest.raises(ExportError, match=r"end with \.xml; \.bin is written beside"):
        export(_net(), x, tmp_path / "net", to="openvino", config=UNTIMED)
    (tmp_path / "net.bin").write_text("of somebody else")
    with pytest.raises(ExportError, match=r"net\.bin exists"):
        export(_net(), x, path, to="openvino", config=UNTIMED)
    export(_net(), x, path, to="openvino", config=UNTIMED, overwrite=True)
    wider = _net(12)
    export(wider, x, path, to="openvino", config=UNTIMED, overwrite=True)
    torch.testing.assert_close(open_exported(path)(x), wider(x), rtol=1e-5, atol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.bin", "net.xml"]


def test_weights_never_lie_beside_a_graph_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = tmp_path / "net.xml", Path.replace
    path.write_text("old")
    path.with_suffix(".bin").write_text("old")

    def killed(self: Path, target: Path) -> Path:
        if target == path:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "replace", killed)

    def write() -> None:
        with atomic_write(path, (".bin",)) as partial:
            partial.write_text("new")
            partial.with_suffix(".bin").write_text("new")

    with pytest.raises(KeyboardInterrupt):
        write()
    assert not path.exists()


def test_importing_openvino_reports_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from tenfold.errors import require; package = require('openvino', 'openvino'); package.Core(); "
        "assert callable(package.convert_model); assert 'openvino_telemetry' not in sys.modules; "
        "import openvino_telemetry"  # found again by who wants it
    )
    silent = {name: value for name, value in os.environ.items() if name != "CI"}  # there it is off anyway
    subprocess.run([sys.executable, "-c", code], check=True, env={**silent, "HOME": str(tmp_path)})
    assert list(tmp_path.iterdir()) == []
