"""Every format × layer kind × {eager, loaded, torch.export, ONNX Runtime, torch.compile}: the same outputs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tenfold.formats import FORMATS
from tenfold.testing.export_laws import check_everywhere

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.mark.filterwarnings("ignore")  # those of the exporters, about themselves
@pytest.mark.parametrize("format", FORMATS.names())
def test_outputs_are_the_same_everywhere(format: str, tmp_path: Path) -> None:
    check_everywhere(FORMATS.get(format), tmp_path)
