"""Every format × layer kind × {eager, loaded, torch.export, ONNX Runtime, torch.compile}: the same outputs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tenfold.formats import FORMATS
from tenfold.layers import FactorizedLayer
from tenfold.records import LayerSpec
from tenfold.testing.export_laws import check_everywhere
from tenfold.testing.weights import random_factors

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.mark.filterwarnings("ignore")  # those of the exporters, about themselves
@pytest.mark.parametrize("format", FORMATS.names())
def test_outputs_are_the_same_everywhere(format: str, tmp_path: Path) -> None:
    check_everywhere(FORMATS.get(format), tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
def test_inductor_compiles_a_factorized_layer() -> None:
    spec = LayerSpec(kind="linear", in_channels=12, out_channels=8)
    factors = random_factors(FORMATS.get("low_rank"), spec, {"rank": 3})
    layer = FactorizedLayer.of(factors).float().eval()
    x = torch.randn(5, 12)
    with torch.no_grad():
        torch._dynamo.reset()
        found = torch.compile(layer, fullgraph=True)(x)
        torch.testing.assert_close(found, layer(x), rtol=1e-5, atol=1e-5)
