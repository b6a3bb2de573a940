"""Weights that others than their own layers compute with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tenfold
from tenfold.profiling import profile


class Reader(nn.Module):
    """An embedding whose table the forward may read in some way."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.table, self.out = how, nn.Embedding(64, 32), nn.Linear(32, 32)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.out(self.table(ids))
        weight = self.table.weight
        match self.how:
            case "logits":
                return x @ weight.T
            case "data":
                return x @ weight.detach().T
            case "dtype":
                return x.to(weight.dtype) + weight.new_zeros(1) + torch.zeros_like(weight)[0]
            case _:
                return x


IDS = torch.tensor([[1, 2, 3]])


@pytest.mark.parametrize("how", ["logits", "data"])
def test_a_layer_whose_weight_others_compute_with_is_kept(how: str) -> None:
    found = profile(Reader(how), IDS)
    assert [layer.path for layer in found.layers if layer.read] == ["table"]
    small = tenfold.compress(
        Reader(how).eval(),
        IDS,
        {"budget": {"params": 0.9}, "keep_ends": False},
        runtime=tenfold.Runtime(measure=False),
    )
    assert "others compute with its weight" in small.plan.layer("table").reason
    assert small.plan.layer("out").action == "factorize"


@pytest.mark.parametrize("how", ["dtype", "nothing"])
def test_questions_are_no_reads(how: str) -> None:
    assert not any(layer.read for layer in profile(Reader(how), IDS).layers)


def test_shared_weights_are_told_as_shared() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    found = profile(model, torch.zeros(1, 8))
    assert not any(layer.read for layer in found.layers)
    assert all("shares a parameter" in layer.note for layer in found.layers)


def test_hooks_are_gone_afterwards() -> None:
    model = Reader("logits")
    profile(model, IDS)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
