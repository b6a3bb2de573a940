"""The sensitivity penalty: what it adds, and that training with it lowers the sensitivity."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tenfold.decompositions import decompose
from tenfold.errors import TuningError
from tenfold.layers import FactorizedLayer
from tenfold.records import LayerSpec
from tenfold.tensors import kruskal
from tenfold.training import SensitivityPenalty, TuneConfig, finetune
from tenfold.training.losses import total_sensitivity

SPEC = LayerSpec(kind="conv", in_channels=4, out_channels=6, kernel=(3, 3), padding=(1, 1))
RANKS = {"cp3": {"rank": 5}, "cp4": {"rank": 5}, "tucker_cp": {"out": 2, "in": 2, "rank": 3}}


def _layer(format: str = "cp3") -> FactorizedLayer:
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    return FactorizedLayer.of(decompose(weight, format, RANKS[format], spec=SPEC).value, None)


@pytest.mark.parametrize("format", RANKS)
def test_it_adds_the_sensitivity_of_all_layers_with_gradients(format: str) -> None:
    layer = _layer(format)
    wanted = float(kruskal.sensitivity([f.double() for f in layer.factorization().terms()]).sum())  # type: ignore[union-attr]
    model = nn.Sequential(layer, nn.Conv2d(6, 6, 1), _layer(format))
    loss = SensitivityPenalty(lambda model, inputs, targets: torch.tensor(3.0), weight=0.5)(model, None, None)
    assert float(loss) == pytest.approx(3 + 0.5 * 2 * wanted, rel=1e-5)
    loss.backward()
    assert all(bool(stage.weight.grad.abs().sum() > 0) for stage in layer.stages if stage.weight.grad is not None)
    assert model[1].weight.grad is None


def test_layers_without_terms_have_no_part() -> None:
    weight = torch.randn(6, 4, 3, 3)
    layer = FactorizedLayer.of(decompose(weight, "tucker2", {"out": 2, "in": 2}, spec=SPEC).value, None)
    assert float(total_sensitivity(layer)) == 0


def test_training_with_it_ends_with_less_sensitivity() -> None:
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(64, 4, 5, 5, generator=generator), torch.arange(64) % 6
    batches = [(images[i : i + 16], labels[i : i + 16]) for i in range(0, 64, 16)]

    def trained(loss: SensitivityPenalty) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(_layer(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        finetune(model, batches, TuneConfig(epochs=4, lr=0.02), loss=loss)
        return float(total_sensitivity(model))

    assert trained(SensitivityPenalty(weight=1e-3)) < 0.9 * trained(SensitivityPenalty(weight=0.0))


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(TuningError, match="at least 0"):
        SensitivityPenalty(weight=-1.0)
