"""What the network minds, against Jacobians computed by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tenfold.calibration.collect import measurable
from tenfold.calibration.gradients import collect_gradients
from tenfold.errors import DataError
from tenfold.tracing.inputs import call_model


def test_random_projections_find_the_squared_jacobian():
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 3))
    x = torch.randn(400, 5)
    with torch.no_grad():
        inner = model[0](x)
    jacobian = model[2].weight * (inner > 0)[:, None]
    wanted = torch.einsum("noi,noj->ij", jacobian, jacobian) / len(x)
    found = collect_gradients(model, [x[:200], x[200:]], measurable(model), draws=40)
    torch.testing.assert_close(found["0"][0].float(), wanted, rtol=0.1, atol=0.02)
    torch.testing.assert_close(found["2"][0].float(), torch.eye(3), rtol=0.1, atol=0.05)


def test_drawn_labels_find_the_fisher_information():
    model, x = nn.Sequential(nn.Linear(5, 3)), torch.randn(200, 5)
    with torch.no_grad():
        p = model(x).softmax(1)
    wanted = (torch.diag_embed(p) - p[:, :, None] * p[:, None]).mean(0)
    found = collect_gradients(model, [x], measurable(model), loss="fisher", draws=100)["0"][0]
    torch.testing.assert_close(found.float(), wanted, rtol=0.1, atol=0.01)


def test_positions_add_up_and_groups_stay_apart():
    model, x = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(24, 2)), torch.randn(3, 4, 4, 4)
    found = collect_gradients(model, [x], measurable(model), draws=300)["0"]
    heads = model[2].weight.detach().reshape(2, 2, 3, 4)  # outputs, groups, channels, positions
    wanted = torch.einsum("kgcp,kgdp->gcd", heads, heads)
    torch.testing.assert_close(found.float(), wanted, rtol=0.15, atol=0.03)


def test_the_model_is_as_before_and_nothing_is_random():
    model, x = nn.Sequential(nn.Linear(5, 4), nn.Dropout(), nn.Linear(4, 3)).train(), [torch.randn(8, 5)]
    first, second = (collect_gradients(model, x, measurable(model))["0"] for _ in range(2))
    assert torch.equal(first, second)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert not model[0]._forward_hooks


def test_nothing_to_learn_from_is_refused():
    model = nn.Sequential(nn.Linear(5, 4))
    with pytest.raises(DataError, match="no batches"):
        collect_gradients(model, [], measurable(model))
    with pytest.raises(DataError, match="no_grad"):
        collect_gradients(model, [torch.randn(2, 5)], measurable(model), forward=torch.no_grad()(call_model))


def test_a_single_vector_without_a_batch_axis():
    model, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(1, 5)
    alone, batched = (collect_gradients(model, [v], measurable(model))["0"] for v in (x[0], x))
    torch.testing.assert_close(alone * 5, batched)  # without a batch axis, the features pass for the samples
