"""The low-rank prior: closed forms against gradients, what is dropped, and what is left of the layers."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tenfold.errors import PlanError
from tenfold.layers import TTGRU, FactorizedLayer, TTEmbedding, TTEmbeddingBag, TTLinear
from tenfold.layers.tt_ranks import bond_cores, scale_bonds_, without_indices
from tenfold.planning import plan
from tenfold.profiling import profile
from tenfold.surgery import apply
from tenfold.training import TuneConfig
from tenfold.training.low_rank.bayesian import BayesianRanks
from tenfold.training.low_rank.priors import BayesianConfig, GammaPrior, HalfCauchyPrior, LogUniformPrior, RankPrior
from tenfold.training.low_rank.train_bayesian import ranks_plan, train_bayesian
from tenfold.training.low_rank.tt_rank_pruning import allowed_params

PRIORS = [GammaPrior(1.5, 5.0), GammaPrior(1.0, 0.0), LogUniformPrior(), HalfCauchyPrior(0.3)]


def train(*ranks: int, modes: tuple[int, ...] = (5, 4, 6), seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    r = (1, *ranks, 1)
    return [torch.randn(r[k], n, r[k + 1], generator=generator, dtype=torch.float64) for k, n in enumerate(modes)]


@pytest.mark.parametrize("prior", PRIORS, ids=str)
def test_the_gradient_is_zero_at_the_closed_form(prior: RankPrior) -> None:
    cores, variances = train(3, 2), (torch.rand(3, dtype=torch.float64) + 0.1, torch.rand(2, dtype=torch.float64) + 0.1)
    for _ in range(200):  # bonds depend on each other in the Gamma prior
        variances = prior.optimum(cores, variances)
    leaves = [v.clone().requires_grad_() for v in variances]
    gradients = torch.autograd.grad(prior.negative_log(cores, leaves), leaves)
    for gradient, variance in zip(gradients, variances, strict=True):
        torch.testing.assert_close(gradient * variance, torch.zeros_like(variance), atol=1e-8, rtol=0)


@pytest.mark.parametrize("prior", PRIORS, ids=str)
def test_each_closed_form_is_the_least_along_its_bond(prior: RankPrior) -> None:
    cores, variances = train(3, 2), (torch.full((3,), 0.7).double(), torch.full((2,), 0.4).double())
    best = prior.optimum(cores, variances)
    for factor in (0.5, 0.9, 1.1, 2.0):
        assert prior.negative_log(cores, (best[0], best[1] * factor)) > prior.negative_log(cores, best)


def test_the_gamma_prior_is_the_density_of_normal_slices() -> None:
    cores = train(3, 2)
    variances = [torch.tensor([0.3, 1.0, 2.0]).double(), torch.tensor([0.5, 1.5]).double()]
    one = torch.ones(1).double()
    said = torch.zeros(()).double()
    for core, left, right in zip(cores, [one, *variances], [*variances, one], strict=True):
        spread = (left[:, None, None] * right).sqrt().expand_as(core)
        said = said - torch.distributions.Normal(0.0, spread).log_prob(core).sum() - core.numel() * 0.9189385332046727
    gamma = torch.distributions.Gamma(torch.tensor(2.0).double(), torch.tensor(3.0).double())
    said = said - sum(gamma.log_prob(v).sum() - len(v) * torch.log(torch.tensor(9.0)) for v in variances)
    torch.testing.assert_close(GammaPrior(2.0, 3.0).negative_log(cores, variances), said)


def test_half_cauchy_is_the_papers_formula() -> None:
    m, d, eta = torch.tensor([2.0, 0.01]).double(), 7, 0.3
    cores = [torch.zeros(1, d, 2).double(), torch.zeros(2, 1, 1).double()]
    cores[0][0, 0] = m.sqrt()
    t = torch.linspace(1e-3, 3, 300_000, dtype=torch.float64)
    found = HalfCauchyPrior(eta).optimum(cores, [m])[0]
    for got, squares in zip(found, m, strict=True):  # the last bond has the slice of the last core too: D = 8
        objective = (d + 1) * t.log() + squares / (2 * t**2) + (eta**2 + t**2).log()
        assert float(got) == pytest.approx(float(t[objective.argmin()] ** 2), rel=1e-3)


def test_balancing_keeps_the_tensor_and_helps_the_prior() -> None:
    layer = TTLinear(24, 20, 3, in_modes=(2, 3, 4), out_modes=(5, 2, 2), dtype=torch.float64)
    with torch.no_grad():
        layer.cores[0].mul_(torch.tensor([10.0, 1.0, 0.1]))
        layer.cores[1].mul_(torch.tensor([0.1, 1.0, 10.0])[:, None, None, None])
    prior, before = GammaPrior(), layer.weight.detach()
    variances = prior.optimum(bond_cores(layer), [torch.ones(3).double()] * 2)
    worse = prior.negative_log(bond_cores(layer), variances)
    scale_bonds_(layer, [(c, 1 / c) for c in prior.scales(bond_cores(layer), variances)])
    torch.testing.assert_close(layer.weight, before)
    assert prior.negative_log(bond_cores(layer), variances) < worse


@pytest.mark.parametrize("prior", ["gamma", "log_uniform"])
def test_rotating_shows_the_rank_and_keeps_the_network(prior: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(TTLinear(24, 20, 6, in_modes=(2, 3, 4), out_modes=(5, 2, 2), dtype=torch.float64))
    model[0].fill_(TTLinear(24, 20, 2, in_modes=(2, 3, 4), out_modes=(5, 2, 2), dtype=torch.float64).weight)
    basis = torch.randn(6, 6, dtype=torch.float64)
    with torch.no_grad():  # the rank 2 of both bonds, spread over all six indices
        model[0].cores[0].copy_(model[0].cores[0] @ basis)
        model[0].cores[1].copy_(torch.einsum("ij,jmnk->imnk", basis.inverse(), model[0].cores[1]))
    before = model[0].weight.detach()
    ranks = BayesianRanks(model, BayesianConfig(samples=10, prior=prior))
    ranks.kept("0")[1][2:] = False  # TT-SVD has put zeros there
    assert float(ranks.variances("0")[0].min() / ranks.variances("0")[0].max()) > 1e-3
    ranks.rotate_(model)
    torch.testing.assert_close(model[0].weight, before)
    share = ranks.variances("0")[0] / ranks.variances("0")[0].max()
    assert int((share > 1e-6).sum()) == 2


@pytest.mark.parametrize("prior", ["gamma", "log_uniform"])
def test_a_timetable_ends_with_enough_and_with_what_carries_the_weight(prior: str) -> None:
    torch.manual_seed(0)
    sizes = {"in_modes": (2, 3, 4), "out_modes": (5, 2, 2), "dtype": torch.float64}
    model = nn.Sequential(TTLinear(24, 20, 6, **sizes))
    true = TTLinear(24, 20, (2, 3), **sizes)
    model[0].fill_(true.weight + 1e-4 * torch.randn(20, 24, dtype=torch.float64))
    enough = sum(core.numel() for core in true.cores)
    pace = BayesianConfig(
        samples=10, prior=prior, warmup=10, ramp=40, every=5, rotate=5, enough=enough, paced=True, threshold=0.99
    )
    ranks, left = BayesianRanks(model, pace), []
    for _ in range(50):
        ranks.advance_(model)
        left.append(ranks.params(model))
    assert left[:10] == [ranks.initial_params] * 10
    assert left == sorted(left, reverse=True)
    assert len(set(left)) > 3
    limits = [allowed_params(ranks.initial_params, enough, (t - 10) / 40) for t in range(1, len(left) + 1)]
    assert all(left[t - 1] <= limits[t - 1] for t in range(15, len(left) + 1, 5))
    assert ranks.prune_(model) == {"0": (2, 3)}
    assert float((model[0].weight - true.weight).detach().norm() / true.weight.detach().norm()) < 0.01
    with pytest.raises(ValueError, match="enough"):
        BayesianConfig(samples=10, paced=True)


def dead(module: nn.Module, kept: list[Tensor]) -> None:
    """Hold at zero what is not kept."""
    masks = [
        torch.zeros(core.shape[-1], dtype=core.dtype).index_fill(0, indices, 1)
        for core, indices in zip(bond_cores(module), kept, strict=False)
    ]
    scale_bonds_(module, [(mask, mask) for mask in masks])


BORN = {
    "linear": (lambda: TTLinear(24, 20, 4, in_modes=(2, 3, 4), out_modes=(5, 2, 2)), torch.randn(3, 24)),
    "embedding": (lambda: TTEmbedding(24, 20, 4, padding_idx=1), torch.tensor([0, 1, 7, 23])),
    "bag": (lambda: TTEmbeddingBag(24, 20, 4, mode="sum"), torch.tensor([[0, 1, 7, 23]])),
}


@pytest.mark.parametrize("kind", BORN)
def test_slicing_what_is_zero_changes_nothing(kind: str) -> None:
    make, inputs = BORN[kind]
    layer, kept = make(), [torch.tensor([0, 2]), torch.tensor([3])]
    dead(layer, kept)
    smaller, moves = without_indices(layer, kept)
    torch.testing.assert_close(smaller(inputs), layer(inputs))
    assert [tuple(c.shape[::2]) for c in bond_cores(smaller)] == [(1, 2), (2, 1), (1, 1)]
    for (old, cut), new in zip(moves, smaller.cores, strict=True):
        assert torch.equal(cut(old.detach()), new)


def factorized(kind: str) -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    layer, inputs = {
        "tt_matrix": (nn.Linear(64, 48), torch.randn(3, 64)),
        "tensor_train": (nn.Conv2d(32, 32, 3), torch.randn(2, 32, 6, 6)),
        "tt_conv": (nn.Conv2d(64, 64, 3), torch.randn(2, 64, 6, 6)),
        "tt_embedding": (nn.Embedding(60, 16, padding_idx=2), torch.tensor([[2, 5, 59]])),
    }[kind]
    dense = nn.Sequential(layer)
    found = plan(dense, profile(dense, inputs), {"rule": {"name": "fixed", "ranks": {"0": 4}}, "formats": kind})
    small = apply(dense, found)
    assert isinstance(small[0], FactorizedLayer), found.layer("0").reason
    return dense, small, inputs


@pytest.mark.parametrize("kind", ["tt_matrix", "tensor_train", "tt_conv", "tt_embedding"])
def test_factorized_layers_lose_indices_and_become_a_plan(kind: str) -> None:
    dense, small, inputs = factorized(kind)
    layer = small[0]
    kept = [torch.arange(max(1, core.shape[-1] - 2)) for core in bond_cores(layer)[:-1]]
    dead(layer, kept)
    said = small(inputs).detach()
    ranks = BayesianRanks(small, BayesianConfig(samples=10))
    for own, indices in zip(ranks.kept("0"), kept, strict=True):
        own.fill_(False)[indices] = True
    left = ranks.prune_(small)
    torch.testing.assert_close(small(inputs), said, atol=1e-5, rtol=1e-5)
    assert max(left["0"], default=1) <= max(len(i) for i in kept)
    again = apply(dense, ranks_plan(small, dense, profile(dense, inputs)))
    assert again[0].rank == small[0].rank


def test_an_optimizer_follows_the_pruning() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(TTLinear(24, 20, 4, in_modes=(4, 6), out_modes=(5, 4)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(torch.randn(8, 24)).square().sum().backward()
    optimizer.step()
    moment, old = optimizer.state[model[0].cores[0]]["exp_avg"].clone(), model[0].cores[0]
    ranks = BayesianRanks(model, BayesianConfig(samples=10))
    ranks.kept("0")[0][1] = False
    assert ranks.prune_(model, optimizer) == {"0": (3,)}
    new, keep = model[0].cores[0], torch.tensor([0, 2, 3])
    assert torch.equal(optimizer.state[new]["exp_avg"], moment[..., keep])
    assert old not in optimizer.state
    assert all(p is q for p, q in zip(optimizer.param_groups[0]["params"], model.parameters(), strict=True))
    before = new.detach().clone()
    model(torch.randn(8, 24)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].cores[0], before)


def test_the_prior_waits_grows_and_keeps_one_index() -> None:
    model = nn.Sequential(TTLinear(24, 20, 4, in_modes=(4, 6), out_modes=(5, 4)))
    ranks = BayesianRanks(
        model, BayesianConfig(samples=10, warmup=10, ramp=10, every=1, rotate=0, threshold=0.999, damping=1.0)
    )
    for step, strength, left in ((10, 0.0, 4), (15, 0.5, 1), (20, 1.0, 1)):
        while int(ranks.steps) < step:
            ranks.advance_(model)
        assert ranks.strength == pytest.approx(strength)
        assert bool(ranks.penalty(model) != 0.0) == (strength > 0)
        assert ranks.ranks() == {"0": (left,)}


def test_dropping_stops_when_it_is_enough() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(TTLinear(24, 20, 4, in_modes=(4, 6), out_modes=(5, 4)))
    ranks = BayesianRanks(model, BayesianConfig(samples=10, every=1, threshold=0.999, enough=100))
    assert ranks.params(model) == 4 * (20 + 24)
    ranks.advance_(model)
    (kept,) = ranks.kept("0")
    assert ranks.params(model) == 2 * (20 + 24)
    assert set(kept.nonzero().flatten().tolist()) == set(ranks.variances("0")[0].topk(2).indices.tolist())
    assert ranks.strength == 0.0
    assert float(ranks.penalty(model).detach()) == 0.0


def test_trains_inside_recurrent_layers_are_found_and_pruned() -> None:
    model = nn.Sequential(TTGRU(16, 8, ranks=3, in_modes=(4, 4), hidden_modes=(2, 4)))
    ranks = BayesianRanks(model, BayesianConfig(samples=10))
    (path,) = ranks.paths
    ranks.kept(path)[0][0] = False
    ranks.prune_(model)
    assert model.get_submodule(path).ranks == (2,)
    assert model[0](torch.randn(5, 2, 16))[0].shape == (5, 2, 8)


def test_a_model_without_trains_is_refused() -> None:
    with pytest.raises(PlanError, match="no layer is a tensor train"):
        BayesianRanks(nn.Linear(2, 2), BayesianConfig(samples=1))


class _Teacher:
    """Batches labelled by a train of ranks 1: what the ranks should come down to."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.layer = TTLinear(16, 9, 1, in_modes=(4, 4), out_modes=(3, 3), bias=False, std=0.25)
        self.inputs = torch.randn(512, 16)
        with torch.no_grad():
            self.targets = self.layer(self.inputs)

    def batches(self, epoch: int) -> list[tuple[Tensor, Tensor]]:
        order = torch.randperm(512, generator=torch.Generator().manual_seed(epoch)).split(64)
        return [(self.inputs[chosen], self.targets[chosen]) for chosen in order]


def squares(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of −log p of the targets, each normal with a deviation of 0.3."""
    return (model(inputs) - targets).square().sum(1).mean() / (2 * 0.09)


@pytest.mark.parametrize("prior", ["gamma", "log_uniform", "half_cauchy"])
def test_training_finds_the_rank_of_the_teacher(prior: str, tmp_path: Path) -> None:
    teacher = _Teacher()
    torch.manual_seed(0)
    model = nn.Sequential(TTLinear(16, 9, 6, in_modes=(4, 4), out_modes=(3, 3), bias=False))
    config = TuneConfig(epochs=60, lr=0.01, clip_norm=5.0, autocast="off")
    belief = BayesianConfig(samples=512, prior=prior, warmup=40, ramp=80)
    found = train_bayesian(model, teacher.batches, config, belief, loss=squares, folder=tmp_path)
    assert found.before == {"0": (6,)}
    assert found.ranks == {"0": (1,)}
    assert model[0].ranks == (1,)
    error = (model[0].weight - teacher.layer.weight).norm() / teacher.layer.weight.norm()
    assert error < 0.05


def test_a_run_that_was_cut_off_ends_the_same(tmp_path: Path) -> None:
    teacher, config = _Teacher(), TuneConfig(epochs=6, optimizer="adamw", lr=0.02, autocast="off")
    belief = BayesianConfig(samples=512, warmup=8, ramp=8, threshold=0.3)

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(TTLinear(16, 9, 6, in_modes=(4, 4), out_modes=(3, 3), bias=False))

    run = partial(train_bayesian, config=config, ranks=belief, loss=squares, tune=config.replace(epochs=2))
    whole = fresh()
    run(whole, teacher.batches)

    def cut(epoch: int) -> list[tuple[Tensor, Tensor]]:
        if epoch == 4:
            raise KeyboardInterrupt
        return teacher.batches(epoch)

    with pytest.raises(KeyboardInterrupt):
        run(fresh(), cut, folder=tmp_path)
    resumed = fresh()
    run(resumed, teacher.batches, folder=tmp_path)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
