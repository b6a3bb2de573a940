"""All networks in one file run in ONNX Runtime as they do here; ``export`` compares for batches of several sizes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from tenfold.exporting import ExportConfig, export
from tenfold.networks import (
    BinaryConv2d,
    Forecaster,
    GeneralizedTTNetwork,
    MPSClassifier,
    MultiDomainNet,
    PolynomialFusion,
    PredictedConv2d,
    PredictedLinear,
    pack,
)


class Every(nn.Module):
    """One of each, on parts of the same numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.mps = MPSClassifier(4, 3, 4, features="trigonometric")
        self.fusion = PolynomialFusion((4, 4), 2, 3)
        self.forecaster = Forecaster(4, 3, horizon=1, kind="hot-lstm")
        self.rectifier = GeneralizedTTNetwork(4, 2, rank=3, features=3)
        self.linear = PredictedLinear(4, 2)
        self.domains = MultiDomainNet(2, 2)
        self.domains.add_domain("digits", inputs=1, classes=2)
        self.binary = BinaryConv2d(1, 2, latent="tucker")
        self.packed = pack(BinaryConv2d(1, 2))

    def forward(self, x: Tensor) -> list[Tensor]:
        rows, image = x.unbind(1), x[:, None]
        return [
            self.mps(rows[0].sigmoid()),
            self.fusion(rows[0], rows[1]),
            self.forecaster(x[:, :1]),
            self.rectifier(x[:, :2]),
            self.linear(x, rows[0][:, :2]),
            self.domains(image),
            self.binary(image),
            self.packed(image),
        ]


def test_every_network_can_be_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    record = export(Every(), torch.randn(2, 4, 4), tmp_path / "net.onnx", config=ExportConfig(seconds=0))
    assert record.dynamic_batch
    assert max(record.parity.values()) < 1e-4


def test_predicted_filters_can_be_exported_for_one_exemplar_at_a_time(tmp_path: Path) -> None:
    """The samples of a batch become groups of one convolution, whose number a file fixes."""
    torch.manual_seed(0)
    inputs = torch.randn(1, 3, 2, 4, 4), torch.randn(1, 18)
    config = ExportConfig(seconds=0, dynamic_batch=False)
    record = export(PredictedConv2d(2, 3, 3), inputs, tmp_path / "net.onnx", config=config)
    assert max(record.parity.values()) < 1e-4
