"""Every network runs in ONNX Runtime as it does here; ``export`` compares the two for batches of several sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tenfold.exporting import ExportConfig, export
from tenfold.networks import Forecaster, GeneralizedTTNetwork, MPSClassifier, PolynomialFusion

PLAIN = ExportConfig(seconds=0)


def cases() -> dict[str, tuple[nn.Module, tuple[torch.Tensor, ...]]]:
    torch.manual_seed(0)
    return {
        "mps": (MPSClassifier(4, 3, 4, features="trigonometric"), (torch.rand(2, 4),)),
        "fusion": (PolynomialFusion((4, 3), 2, 3), (torch.randn(2, 4), torch.randn(2, 3))),
        "forecaster": (Forecaster(2, 3, horizon=1, kind="hot-rnn"), (torch.randn(2, 1, 2),)),
        "rectifier": (GeneralizedTTNetwork(4, 2, rank=3, features=3), (torch.randn(2, 2, 4),)),
    }


@pytest.mark.parametrize("name", sorted(cases()))
def test_export(name: str, tmp_path: Path) -> None:
    model, inputs = cases()[name]
    record = export(model.eval(), inputs, tmp_path / "net.onnx", config=PLAIN)
    assert record.dynamic_batch
    assert max(record.parity.values()) < 1e-4
