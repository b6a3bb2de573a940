"""Costs on the grid are exactly those of cost_at; distortions are exact tails; what is offered is cheaper, in order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tenfold.ranks import RankProblem
from tenfold.ranks.candidates import candidates, grids, tail_distortion

from tenfold.allocation.knapsack import solve
from tenfold.decompositions import decompose
from tenfold.errors import RankError
from tenfold.formats import FORMATS, Rank
from tenfold.records import Call, Cost, LayerSpec

CONV = {"kind": "conv", "kernel": (3, 3), "padding": (1, 1)}
SPECS = {
    "conv": LayerSpec(**CONV, in_channels=40, out_channels=72, bias=True),
    "strided": LayerSpec(**CONV, in_channels=72, out_channels=24, stride=(2, 2)),
    "grouped": LayerSpec(**CONV, in_channels=64, out_channels=96, groups=4, bias=True),
    "wide kernel": LayerSpec(
        kind="conv", kernel=(5, 3), padding="same", in_channels=32, out_channels=33, dilation=(1, 2)
    ),
    "first": LayerSpec(kind="conv", kernel=(7, 7), padding=(3, 3), stride=(2, 2), in_channels=3, out_channels=64),
    "one-dimensional": LayerSpec(kind="conv", kernel=(5,), padding=(2,), in_channels=30, out_channels=20),
    "transposed": LayerSpec(
        kind="conv_transpose", kernel=(4, 4), stride=(2, 2), padding=(1, 1), in_channels=24, out_channels=40
    ),
    "pointwise": LayerSpec(kind="conv", kernel=(1, 1), in_channels=80, out_channels=100),
    "linear": LayerSpec(kind="linear", in_channels=90, out_channels=130, bias=True),
    "embedding": LayerSpec(kind="embedding", in_channels=500, out_channels=48),
    "tiny": LayerSpec(**CONV, in_channels=2, out_channels=3),
}


def problem_of(spec: LayerSpec, *, current: tuple[str, Rank] | None = None, seed: int = 0) -> RankProblem:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(spec.group_shape, generator=g)
    formats = tuple(n for n in ("tucker2", "low_rank", "spatial") if FORMATS.get(n).unsupported_reason(spec) is None)
    match spec.kind:
        case "linear":
            shapes = [(2, 7, spec.in_channels), (5, spec.in_channels)]
        case "embedding":
            shapes = [(2, 7)]
        case _:
            shapes = [(2, spec.in_channels, *(13, 10)[: spec.axes]), (1, spec.in_channels, *(6, 6)[: spec.axes])]
    calls = tuple(Call(in_shape=shape, count=1 + n) for n, shape in enumerate(shapes))
    cost = Cost(params=spec.num_params, macs=sum(spec.macs(c.in_shape) * c.count for c in calls))
    problem = RankProblem("layer", spec, formats, calls, cost, lambda: weight)
    if current is None:
        return problem
    return RankProblem("layer", spec, formats, calls, problem.cost_at(*current), lambda: weight, current)


@pytest.mark.parametrize("name", SPECS)
def test_costs_are_exact_on_the_whole_grid(name: str) -> None:
    problem = problem_of(SPECS[name])
    g = np.random.default_rng(0)
    for format in problem.formats:
        kind = FORMATS.get(format)
        full = kind.max_rank(problem.spec)
        ranks = np.stack([g.integers(1, full[n] + 1, size=60) for n in kind.rank_names], axis=1)
        ranks[:20, 0] = full[kind.rank_names[0]]  # the sides that have no factor at full rank
        ranks[15:35, -1] = full[kind.rank_names[-1]]
        params, macs = problem.costs_at(format, ranks)
        for row, p, m in zip(ranks.tolist(), params, macs, strict=True):
            assert problem.cost_at(format, dict(zip(kind.rank_names, row, strict=True))) == Cost(params=p, macs=m)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("step", [None, 1, 8])
def test_candidates_are_all_that_is_cheaper(name: str, step: int | None) -> None:
    problem = problem_of(SPECS[name])
    offered = candidates(problem, step=step)
    for candidate in offered:
        assert problem.cost_at(candidate.format, candidate.rank) == candidate.cost
        assert candidate.cost.below(problem.cost)
    for format in problem.formats if step == 1 else ():  # nothing that is cheaper is left out
        kind = FORMATS.get(format)
        full = [kind.max_rank(problem.spec)[n] for n in kind.rank_names]
        if max(full) > 60:
            continue  # too many to look at one by one
        every = (dict(zip(kind.rank_names, (i + 1 for i in r), strict=True)) for r in np.ndindex(*full))
        cheaper = [r for r in every if problem.cost_at(format, r).below(problem.cost)]
        assert [c.rank for c in offered if c.format == format] == cheaper
    assert offered == candidates(problem, step=step)


def test_grid_has_multiples_and_full_sides() -> None:
    problem = problem_of(LayerSpec(**CONV, in_channels=128, out_channels=100))
    by_format = {grid.format: grid for grid in grids(problem)}
    assert list(by_format) == list(problem.formats)
    tucker = by_format["tucker2"].ranks
    assert set(tucker[:, 0]) == {*range(8, 100, 8), 100}
    assert set(tucker[:, 1]) == {*range(8, 128, 8), 128}
    assert [100, 64] in tucker.tolist()
    assert [24, 128] in tucker.tolist()
    assert [100, 128] not in tucker.tolist()
    assert tucker.tolist() == sorted(tucker.tolist())
    assert by_format["low_rank"].ranks[:, 0].tolist() == [*range(8, 100, 8)][: len(by_format["low_rank"])]


@pytest.mark.parametrize(("channels", "step"), [(16, 1), (32, 2), (64, 4), (72, 8), (512, 8)])
def test_small_layers_have_finer_grids(channels: int, step: int) -> None:
    spec = LayerSpec(kind="conv", kernel=(3, 3), padding=(1, 1), in_channels=channels, out_channels=channels)
    (grid, *_) = grids(problem_of(spec))
    assert np.unique(grid.ranks[:, 0])[:3].tolist() == [step, 2 * step, 3 * step]


def test_factorized_layer_only_goes_further() -> None:
    now = ("tucker2", {"out": 32, "in": 24})
    problem = problem_of(SPECS["conv"], current=now)
    offered = candidates(problem)
    assert offered
    assert all(c.cost.below(problem.cost) for c in offered)
    assert now[1] not in [c.rank for c in offered if c.format == "tucker2"]


@pytest.mark.parametrize("step", [0, -8, 2.0, True])
def test_steps_that_cannot_be(step: int) -> None:
    with pytest.raises(RankError, match="step"):
        candidates(problem_of(SPECS["conv"]), step=step)


@pytest.mark.parametrize(
    ("name", "format"),
    [(n, "low_rank") for n in ("conv", "grouped", "transposed", "linear", "embedding")]
    + [(n, "spatial") for n in ("conv", "grouped", "transposed", "wide kernel")],
)
def test_distortion_of_one_unfolding_is_what_the_svd_loses(name: str, format: str) -> None:
    problem = problem_of(SPECS[name])
    kind = FORMATS.get(format)
    matrix = next(iter(kind.unfoldings(problem.load_weight().double(), problem.spec).values()))
    squares = torch.linalg.svdvals(matrix).square()
    ranks = np.array([[1], [3], [squares.shape[1]]])
    expected = [float(squares[:, r:].sum() / squares.sum()) for r in ranks[:, 0]]
    np.testing.assert_allclose(tail_distortion(problem, format)(ranks), expected, rtol=1e-6, atol=1e-12)


def test_distortion_of_tucker2_bounds_the_error_closely() -> None:
    spec = LayerSpec(**CONV, in_channels=24, out_channels=32)
    problem = problem_of(spec)
    ranks = np.array([[8, 8], [16, 12], [32, 12], [16, 24], [31, 23]])
    for (out, inner), estimate in zip(ranks.tolist(), tail_distortion(problem, "tucker2")(ranks), strict=True):
        error = decompose(problem.load_weight()[0], "tucker2", {"out": out, "in": inner}).rel_error ** 2
        assert error <= estimate * (1 + 1e-5)
        assert estimate <= 2 * error * (1 + 1e-5)
        if out == 32 or inner == 24:  # one side alone: the SVD of one unfolding, exactly
            assert estimate == pytest.approx(error, rel=1e-4)


def test_distortion_falls_with_rank_and_is_zero_at_full_rank() -> None:
    distortion = tail_distortion(problem_of(SPECS["first"]), "tucker2")
    values = distortion(np.stack(np.meshgrid(np.arange(1, 65), np.arange(1, 4), indexing="ij"), -1).reshape(-1, 2))
    table = values.reshape(64, 3)
    assert (np.diff(table, axis=0) <= 0).all()
    assert (np.diff(table, axis=1) <= 0).all()
    assert table[-1, -1] == 0
    assert table.max() <= 1
    zero = problem_of(SPECS["conv"])
    dead = RankProblem(
        "dead", zero.spec, zero.formats, zero.calls, zero.cost, lambda: torch.zeros(zero.spec.group_shape)
    )
    assert tail_distortion(dead, "tucker2")(np.array([[1, 1]])).tolist() == [0]


def test_grids_and_distortions_make_a_knapsack() -> None:
    problems = [
        problem_of(SPECS[n], seed=k) for k, n in enumerate(("conv", "strided", "grouped", "pointwise", "linear"))
    ]
    offered = [[g for g in grids(p, step=2) if len(g)] for p in problems]
    distortions = [
        np.concatenate([[0.0], *(tail_distortion(p, g.format)(g.ranks) for g in gs)])
        for p, gs in zip(problems, offered, strict=True)
    ]
    names = ("macs", "params")
    costs = [
        np.concatenate([[[p.cost.macs, p.cost.params]], *(g.costs(names) for g in gs)])
        for p, gs in zip(problems, offered, strict=True)
    ]
    limits = [0.5 * sum(p.cost.macs for p in problems), 0.6 * sum(p.cost.params for p in problems)]
    found = solve(distortions, costs, limits, names=names)
    assert found.gap <= 1e-3
    assert all(0.98 * limit <= max(c, 0.98 * limit) <= limit for c, limit in zip(found.cost, limits, strict=True))
    assert any(c >= 0.99 * limit for c, limit in zip(found.cost, limits, strict=True))
