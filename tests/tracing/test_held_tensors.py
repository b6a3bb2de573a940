"""Tensors that modules keep besides their parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tenfold.tracing.held_tensors import drop_graphs, leave_inference_
from tenfold.tracing.references import copied, trainable_copy


class Keeps(nn.Module):
    """Keeps feature maps in every way that people keep them."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.register_buffer("last", torch.zeros(1))
        self.maps, self.named = [], {}

    def forward(self, x):
        out = self.fc(x)
        self.last, self.view = out, out[:1]
        self.maps[:] = [out, (out, {"again": out})]
        self.named["out"] = out
        return out


def test_graphs_are_dropped_and_values_stay():
    model = Keeps()
    out = model(torch.ones(2, 3))
    drop_graphs(model)
    kept = [model.last, model.maps[0], model.maps[1][0], model.maps[1][1]["again"], model.named["out"]]
    assert all(torch.equal(t, out) and not t.requires_grad for t in kept)
    assert not model.view.requires_grad
    assert model.fc.weight.requires_grad
    copy.deepcopy(model)


def test_a_model_that_keeps_a_graph_is_copied_and_stays_as_it_is():
    model = Keeps()
    out = model(torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    made = copied(model)
    assert torch.equal(made.last, out)
    assert not made.last.requires_grad
    assert made.maps[0] is made.last  # shared as before
    assert model.last is out


def made_in_inference_mode():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
        model[2].weight = model[0].weight
        model.cache = [torch.ones(2)]
    return model


def test_a_copy_is_made_only_of_what_inference_mode_has_made():
    plain, made = nn.Linear(2, 2), made_in_inference_mode()
    assert trainable_copy(plain) is plain
    result = trainable_copy(made)
    assert not any(t.is_inference() for t in (*result.state_dict().values(), *result.cache))
    assert all(t.is_inference() for t in made.state_dict().values())
    result(torch.ones(4, 3)).sum().backward()
    cached = nn.Linear(2, 2)
    with torch.inference_mode():
        cached.mask = torch.ones(2)  # by a first forward, for instance
    assert not trainable_copy(cached).mask.is_inference()
    assert trainable_copy(lazy := nn.LazyLinear(3)) is lazy


def test_in_place_ties_and_flags_stay():
    model = made_in_inference_mode()
    model[0].bias.requires_grad = False
    leave_inference_(model)
    assert model[2].weight is model[0].weight
    assert isinstance(model[0].weight, nn.Parameter)
    assert [p.requires_grad for p in model[0].parameters()] == [True, False]
    assert not any(t.is_inference() for t in (*model.state_dict().values(), *model.cache))
