"""The matrix product state: the whole tensor, multiplied out, is the oracle."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tenfold.errors import CheckpointError, DataError, RankError, UnknownNameError, WeightError
from tenfold.networks import (
    FEATURE_MAPS,
    MPSClassifier,
    SweepConfig,
    feature_map,
    snake,
    train_by_sweeps,
)
from tenfold.networks.bond_tensor import BondProblem, Cost
from tenfold.networks.mps_chain import Chain


def model_of(sites: int = 6, bonds: int | tuple[int, ...] = 3, **options: object) -> MPSClassifier:
    torch.manual_seed(0)
    return MPSClassifier(sites, 4, bonds, std=0.3, dtype=torch.float64, **options)  # type: ignore[arg-type]


def dense_scores(model: MPSClassifier, x: Tensor) -> Tensor:
    """Contract the whole tensor (d, ..., classes, ..., d) with the features of all sites, one after the other."""
    whole = torch.ones(1, dtype=torch.float64)
    for core in model.cores:
        whole = torch.tensordot(whole, core, 1)
    features, _ = feature_map(model.features)
    found = []
    for row in x:
        rest = whole.squeeze(-1).movedim(model.label_site + 1, -1)
        for value in row:
            rest = torch.tensordot(features(value), rest, 1)
        found.append(rest)
    return torch.stack(found)


@pytest.mark.parametrize("features", sorted(FEATURE_MAPS))
@pytest.mark.parametrize("label_site", [0, 2, 5])
def test_scores_are_those_of_the_whole_tensor(features: str, label_site: int) -> None:
    model = model_of(bonds=(2, 4, 3, 3, 2), features=features, label_site=label_site)
    x = torch.rand(5, 6, dtype=torch.float64)
    torch.testing.assert_close(model(x), dense_scores(model, x))
    assert model.bonds == (2, 4, 3, 3, 2)


def test_macs_are_those_of_torch() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = MPSClassifier(9, 4, (2, 4, 3, 3, 2, 5, 5, 2), features="quadratic")
    with FlopCounterMode(display=False) as counter:
        model(torch.rand(1, 9))
    sides = (1, *model.bonds, 1)
    outer = 3 * (sum(sides[:5]) + sum(sides[6:]))  # the products of states and features are no matrix products
    assert model.macs() == counter.get_total_flops() // 2 + outer


@pytest.mark.parametrize("features", sorted(FEATURE_MAPS))
def test_the_start_passes_states_on_over_many_sites(features: str) -> None:
    torch.manual_seed(0)
    x = torch.rand(64, 400) * (torch.rand(64, 400) < 0.2)  # images are mostly background
    model = MPSClassifier(400, 10, 12, features=features)
    model.start_(x)
    scores = model(x)
    assert 1e-3 < float(scores.detach().std()) < 10
    scores.sum().backward()
    sizes = torch.stack([core.grad.norm() for core in model.cores])  # type: ignore[union-attr]
    assert float(sizes.min()) > 1e-4 * float(sizes.max()) > 0


def test_canonical_form_changes_no_score_and_has_states_of_norm_one() -> None:
    model, x = model_of(sites=7, bonds=5, features="trigonometric"), torch.rand(9, 7, dtype=torch.float64)
    before = model(x).detach()
    chain = Chain.of(model, x)
    for k in range(model.label_site):
        flat = chain.cores[k].flatten(0, 1)
        gram = flat.mT @ flat
        torch.testing.assert_close(gram, gram[0, 0] * torch.eye(len(gram), dtype=gram.dtype))
        assert float(chain.left[k + 1].square().sum(1).mean()) == pytest.approx(1)
    chain.write_to_(model)
    torch.testing.assert_close(model(x), before)
    assert max(model.bonds) <= 5


@pytest.mark.parametrize("rightwards", [True, False])
def test_the_pair_of_sites_gives_the_scores_and_is_split_without_loss(rightwards: bool) -> None:
    model, x = model_of(sites=6, bonds=3, label_site=3), torch.rand(8, 6, dtype=torch.float64)
    before, chain = model(x).detach(), Chain.of(model, x)
    tensor = chain.pair(3, rightwards=rightwards)
    cost = Cost("squared", torch.zeros(8, dtype=torch.long))
    problem = BondProblem(*chain.around(3, rightwards=rightwards), cost)
    torch.testing.assert_close(problem.scores(tensor).mT, before)
    assert chain.split(3, tensor, problem.roots, SweepConfig(bonds=99), rightwards=rightwards) < 1e-10
    site = 4 if rightwards else 2
    for onwards in (True, False):  # the centre and its states have moved along
        moved = BondProblem(*chain.around(site, rightwards=onwards), cost)
        torch.testing.assert_close(moved.scores(chain.pair(site, rightwards=onwards)).mT, before)


@pytest.mark.parametrize("name", ["cross_entropy", "squared"])
def test_slopes_and_curvatures_are_derivatives(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    scores, change = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    cost, step = Cost(name, torch.tensor([0, 1, 2, 0, 1, 2])), 1e-4  # type: ignore[arg-type]
    up, here, down = (cost.value(scores + t * change) for t in (step, 0.0, -step))
    slope, curvature = cost.along(scores, change)
    assert float((cost.slope(scores) * change).sum(0).mean()) == pytest.approx(slope)
    assert slope == pytest.approx((up - down) / 2 / step, rel=1e-5)
    assert curvature == pytest.approx((up - 2 * here + down) / step**2, rel=1e-4)


def test_squared_cost_is_solved_like_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(60, n, generator=generator, dtype=torch.float64) for n in (3, 2))
    labels = torch.randint(0, 3, (60,), generator=generator)
    problem = BondProblem(left, right, Cost("squared", labels), ridge=0.1)
    found, _ = problem.solve(torch.zeros(3, 3, 2, dtype=torch.float64), steps=40)
    rows = (left[:, :, None] * right[:, None, :]).flatten(1)
    wanted = torch.linalg.solve(
        rows.mT @ rows / 60 + 0.1 * torch.eye(6, dtype=torch.float64),
        rows.mT @ torch.nn.functional.one_hot(labels, 3).double() / 60,
    )
    torch.testing.assert_close(found.transpose(1, 2).flatten(0, 1), wanted, rtol=1e-4, atol=1e-6)


def parity(samples: int = 400) -> tuple[Tensor, Tensor]:
    """Whether an odd number of six bits is set: of bond 2, and no function of fewer than all bits helps."""
    x = torch.randint(0, 2, (samples, 6), generator=torch.Generator().manual_seed(1)).double()
    return x, x.sum(1).long() % 2


def test_sweeps_learn_and_find_the_bond() -> None:
    x, y = parity()
    torch.manual_seed(0)
    model = MPSClassifier(6, 2, 4, dtype=torch.float64, std=0.3)
    records = train_by_sweeps(model, x, y, SweepConfig(sweeps=4, bonds=4, steps=6, cost="squared", cutoff=1e-6))
    assert bool((model(x).argmax(1) == y).all())
    assert records[-1].cost < 1e-4 < records[0].cost
    assert records[-1].bonds == model.bonds == (2,) * 5


def test_sweeps_without_truncation_never_raise_the_cost() -> None:
    x, y = parity()
    model = model_of(bonds=2)
    model2 = MPSClassifier(6, 2, 2, dtype=torch.float64)
    costs = [r.cost for r in train_by_sweeps(model2, x, y, SweepConfig(sweeps=4, bonds=99, steps=2, cutoff=0.0))]
    assert costs == sorted(costs, reverse=True)
    assert max(model2.bonds) <= 8 < max(model.sites, 9)


def test_bonds_stay_below_the_bound_and_drops_are_reported() -> None:
    x, y = parity()
    model = model_of(bonds=3)
    (record,) = train_by_sweeps(model, x, y, SweepConfig(sweeps=1, bonds=2))
    assert max(record.bonds) <= 2
    assert record.dropped > 0


def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    x, y = parity()
    config = SweepConfig(sweeps=3, bonds=3, samples=100)

    def run(sweeps: int, folder: str) -> tuple[MPSClassifier, int]:
        model = MPSClassifier(6, 2, 2, std=0.1)
        return model, len(
            train_by_sweeps(model, x.float(), y, SweepConfig(sweeps, 3, samples=100), folder=tmp_path / folder)
        )

    torch.manual_seed(0)
    whole, _ = run(config.sweeps, "whole")
    torch.manual_seed(0)
    run(1, "cut")
    resumed, count = run(config.sweeps, "cut")  # from other random cores
    assert count == 3
    assert all(torch.equal(a, b) for a, b in zip(whole.cores, resumed.cores, strict=True))
    with pytest.raises(CheckpointError, match="other data or settings"):
        train_by_sweeps(resumed, x.float()[:50], y[:50], config, folder=tmp_path / "cut")


def test_state_dicts_of_other_bonds_load_and_those_of_other_sites_do_not() -> None:
    small, large = model_of(bonds=2), model_of(bonds=(2, 4, 4, 3, 2))
    small.load_state_dict(large.state_dict())
    x = torch.rand(3, 6, dtype=torch.float64)
    assert torch.equal(small(x), large(x))
    with pytest.raises(RuntimeError, match=r"size mismatch|Missing key"):
        small.load_state_dict(model_of(sites=5).state_dict())


def test_refusals_say_why() -> None:
    with pytest.raises(WeightError, match="1 sites and 2 classes"):
        MPSClassifier(1, 2)
    with pytest.raises(WeightError, match="label_site=7 is one of the 6 sites"):
        MPSClassifier(6, 2, label_site=7)
    with pytest.raises(RankError, match="5 ranks"):
        MPSClassifier(6, 2, bonds=(2, 2))
    with pytest.raises(UnknownNameError, match="Did you mean trigonometric"):
        MPSClassifier(6, 2, features="trigonometry")
    with pytest.raises(WeightError, match="append one axis"):
        MPSClassifier(6, 2, features=torch.sin)
    model = MPSClassifier(6, 2)
    with pytest.raises(WeightError, match=r"shape \(2, 5\): \(batch, 6\)"):
        model(torch.rand(2, 5))
    with pytest.raises(DataError, match="labels 0 to 2: they are to be 0 to 1"):
        train_by_sweeps(model, torch.rand(3, 6), torch.arange(3))
    with pytest.raises(DataError, match="one label for each"):
        train_by_sweeps(model, torch.rand(3, 6), torch.arange(2))
    with pytest.raises(WeightError, match="steps=0"):
        SweepConfig(steps=0)
    with pytest.raises(WeightError, match="cost='hinge'"):
        SweepConfig(cost="hinge")  # type: ignore[arg-type]


def test_snakes_visit_every_pixel_once() -> None:
    image = torch.arange(12).view(3, 4)
    path = snake(image)
    assert sorted(path.tolist()) == list(range(12))
    places = [divmod(int(p), 4) for p in path]
    assert all(abs(a - c) + abs(b - d) == 1 for (a, b), (c, d) in pairwise(places))  # one step at a time
