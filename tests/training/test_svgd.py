"""Stein variational gradient descent against posteriors that are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.errors import TuningError
from tenfold.training import TuneConfig, finetune
from tenfold.training.low_rank.svgd import Ensemble, log_likelihood, stein_direction


def test_the_direction_is_the_papers_sum() -> None:
    x, s, h = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64), 1.7
    for i in range(5):
        said = torch.zeros(3, dtype=torch.float64)
        for j in range(5):
            leaf = x[j].clone().requires_grad_()
            kernel = (-(leaf - x[i]).square().sum() / h).exp()
            (gradient,) = torch.autograd.grad(kernel, leaf)
            said += (kernel.detach() * s[j] + gradient) / 5
        torch.testing.assert_close(stein_direction(x, s, h)[i], said)


def test_the_bandwidth_is_the_median_over_log_n() -> None:
    x, s = torch.tensor([[0.0], [1.0], [3.0]]), torch.randn(3, 1)
    torch.testing.assert_close(stein_direction(x, s), stein_direction(x, s, 4.0 / math.log(3)))


def test_one_particle_climbs() -> None:
    assert torch.equal(stein_direction(torch.zeros(1, 2), torch.tensor([[1.0, -2.0]])), torch.tensor([[1.0, -2.0]]))


def test_an_ensemble_finds_the_conjugate_posterior() -> None:
    torch.manual_seed(0)
    noise, spread, n = 0.5, 2.0, 40
    x = torch.randn(n, 2) @ torch.tensor([[1.0, 0.0], [0.6, 0.5]])
    y = x @ torch.tensor([1.0, -1.5]) + noise * torch.randn(n)
    precision = x.T @ x / noise**2 + torch.eye(2) / spread**2  # normal prior, normal noise: so is the posterior
    covariance = precision.inverse()
    mean = covariance @ (x.T @ y) / noise**2

    def likelihood(member: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(member(inputs).squeeze(1), targets) / (2 * noise**2)

    def prior(member: nn.Module) -> Tensor:
        return sum((p.square().sum() for p in member.parameters()), torch.zeros(())) / (2 * spread**2)

    ensemble = Ensemble([nn.Linear(2, 1, bias=False) for _ in range(40)])
    config = TuneConfig(epochs=600, optimizer="adamw", lr=0.03, weight_decay=0, clip_norm=None, autocast="off")
    finetune(ensemble, [(x, y)], config, loss=ensemble.loss(n, likelihood, prior))
    found = ensemble.particles().detach()
    torch.testing.assert_close(found.mean(0), mean, atol=0.02, rtol=0)
    torch.testing.assert_close(found.T.cov(), covariance, atol=0.1 * float(covariance.max()), rtol=0)


def test_predictions_are_means_of_probabilities() -> None:
    members = [nn.Linear(3, 4) for _ in range(3)]
    ensemble, x, labels = Ensemble(members), torch.randn(5, 3), torch.tensor([0, 1, 2, 3, 0])
    mean = torch.stack([m(x).softmax(-1) for m in members]).mean(0)
    torch.testing.assert_close(ensemble(x).exp(), mean)
    said = float(mean[torch.arange(5), labels].log().mean().detach())
    assert log_likelihood(ensemble, [(x[:2], labels[:2]), (x[2:], labels[2:])]) == pytest.approx(said, rel=1e-5)


def test_the_value_is_the_loss_and_the_gradient_goes_downhill() -> None:
    torch.manual_seed(0)
    ensemble, x, labels = Ensemble([nn.Linear(3, 2)]), torch.randn(8, 3), torch.randint(2, (8,))
    value = ensemble.loss(samples=8)(ensemble, x, labels)
    said = F.cross_entropy(ensemble.members[0](x), labels)
    torch.testing.assert_close(value, said)
    (mine,) = torch.autograd.grad(value, [ensemble.members[0].weight])
    (own,) = torch.autograd.grad(said, [ensemble.members[0].weight])
    torch.testing.assert_close(mine, own)  # one particle is gradient descent


def test_unequal_members_are_refused() -> None:
    with pytest.raises(TuningError, match="same names and shapes"):
        Ensemble([nn.Linear(2, 2), nn.Linear(2, 3)])


def test_the_likelihood_is_that_of_evaluation_and_leaves_no_trace() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2), nn.Dropout(0.9)).train()
    x, y = 5 + torch.randn(8, 3), torch.arange(8) % 2
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = log_likelihood(model, [(x, y)])
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(m.training for m in model.modules())
    with torch.no_grad():
        assert found == pytest.approx(-float(F.cross_entropy(model.eval()(x), y)), rel=1e-6)
