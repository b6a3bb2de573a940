"""Tensor trains as formats: the published costs, Tucker-2 and the dense layer as special cases, the cheapest order."""

from __future__ import annotations

from itertools import pairwise, permutations

import numpy as np
import pytest
import torch
from torch.nn import functional

from tenfold.allocation import rule_from
from tenfold.decompositions import DECOMPOSITIONS, Moments, curves, decompose, error_curve
from tenfold.formats import FORMATS
from tenfold.formats.tensor_train import TensorTrain
from tenfold.formats.tt_matrix import cheapest
from tenfold.layers import FactorizedLayer
from tenfold.planning import plan
from tenfold.planning.eligible import EligibleLayer, costs_of
from tenfold.planning.rows import rows_of
from tenfold.profiling import profile
from tenfold.records import Call, Cost, LayerSpec, chain_macs

F64 = torch.float64
CONV = LayerSpec(kind="conv", in_channels=8, out_channels=12, kernel=(3, 3), stride=(2, 2), padding=(1, 1), bias=True)
SQUARE = LayerSpec(kind="conv", in_channels=64, out_channels=64, kernel=(3, 3), padding=(1, 1))
UNMERGED = tuple((k, k) for k in range(5))


def random_weight(spec: LayerSpec, seed: int = 0) -> torch.Tensor:
    return torch.randn(spec.weight_shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def named(format: str, *ranks: int) -> dict[str, int]:
    return dict(zip(FORMATS.get(format).rank_names, ranks, strict=True))


def published_macs(spec: LayerSpec, rank: dict[str, int], pixels: int, out_pixels: int) -> int:
    """The closed form of HODEC for two modes on each side, every core on its own."""
    (o1, o2), (i1, i2) = TensorTrain.channel_modes(spec)
    r1, r2, r3, r4 = rank.values()
    taps = spec.kernel[0] * spec.kernel[1]
    return pixels * (r4 * i2 * i1 + r3 * i1 * r4) + out_pixels * (taps * r2 * r3 + r1 * o2 * r2 + o1 * r1 * o2)


@pytest.mark.parametrize(("ranks", "wanted"), [((3, 12, 8, 4), 33_876), ((3, 6, 5, 3), 13_824)])
def test_macs_of_hodec_counted_step_by_step(ranks, wanted):
    rank = named("tensor_train", *ranks)
    stages = tuple(step.stage(CONV) for step in TensorTrain.steps(CONV, UNMERGED, (1, *rank.values(), 1)))
    assert chain_macs(stages, (1, 8, 9, 9)) == published_macs(CONV, rank, 81, 25) == wanted
    assert TensorTrain.macs(CONV, rank, (1, 8, 9, 9)) < wanted  # bonds that carry all they can cost nothing here


def test_macs_are_the_published_ones_where_no_bond_is_full():
    for ranks in ((5, 20, 20, 5), (7, 40, 30, 5), (3, 16, 20, 6)):
        rank = named("tensor_train", *ranks)
        assert TensorTrain.macs(SQUARE, rank, (1, 64, 10, 10)) == published_macs(SQUARE, rank, 100, 100)
        assert TensorTrain.runs(SQUARE, rank) == UNMERGED


@pytest.mark.parametrize("format", ["tensor_train", "tt_conv"])
@pytest.mark.parametrize("full", [True, False])
def test_a_layer_equals_the_convolution_that_holds_its_kernel(format, full):
    kind = FORMATS.get(format)
    weight, x = random_weight(CONV), torch.randn(2, 8, 9, 9, dtype=F64)
    rank = kind.max_rank(CONV) if full else kind.rank_family(CONV)[2]
    fit = decompose(weight, format, rank, spec=CONV)
    layer = FactorizedLayer.of(fit.value, torch.ones(12, dtype=F64))
    wanted = functional.conv2d(x, fit.value.to_dense(), torch.ones(12, dtype=F64), stride=2, padding=1)
    assert float((layer(x) - wanted).detach().abs().max()) < 1e-13
    assert not full or float((fit.value.to_dense() - weight).abs().max()) < 1e-14


def test_with_full_outer_ranks_it_is_tucker2():
    tucker2 = FORMATS.get("tucker2")
    for out, inner in ((24, 16), (64, 16), (24, 64), (64, 64)):
        rank = TensorTrain.check_rank(SQUARE, {"r2": out, "r3": inner})
        assert TensorTrain.structure(SQUARE, rank) == tucker2.structure(SQUARE, {"out": out, "in": inner})
    weight = random_weight(SQUARE)
    train = decompose(weight, "tensor_train", {"r2": 24, "r3": 16}, spec=SQUARE)
    hosvd = decompose(weight, "tucker2", {"out": 24, "in": 16}, DECOMPOSITIONS.get("hosvd")(), spec=SQUARE)
    assert train.rel_error == pytest.approx(hosvd.rel_error, rel=0.02)


def test_ranks_that_the_train_cannot_use_are_lowered():
    assert TensorTrain.check_rank(SQUARE, named("tensor_train", 1, 64, 64, 8)) == named("tensor_train", 1, 8, 64, 8)
    fit = decompose(random_weight(SQUARE), "tensor_train", named("tensor_train", 1, 64, 64, 8), spec=SQUARE)
    assert fit.value.rank == named("tensor_train", 1, 8, 64, 8)
    net = torch.nn.Sequential(torch.nn.Conv2d(64, 64, 3))
    rule = {"name": "fixed", "ranks": {"0": named("tensor_train", 1, 64, 16, 4)}}
    made = plan(net, profile(net, torch.zeros(1, 64, 5, 5)), {"rule": rule, "formats": ["tensor_train"]})
    assert made.layer("0").rank == named("tensor_train", 1, 8, 16, 4)


def test_classical_trains_cost_more_macs_than_the_dense_layer_and_hodec_far_fewer():
    shape, dense = (1, 64, 8, 8), SQUARE.macs((1, 64, 8, 8))
    classical = FORMATS.get("tt_conv")
    rank = named("tt_conv", 14, 20, 8)  # near a row of Garipov et al., 64 to 64 channels in 4×4×4
    assert classical.num_params(SQUARE, rank) < SQUARE.num_params / 2
    assert classical.macs(SQUARE, rank, shape) > 2 * dense
    train = named("tensor_train", 6, 28, 28, 6)
    assert TensorTrain.num_params(SQUARE, train) < SQUARE.num_params / 3
    assert TensorTrain.macs(SQUARE, train, shape) < dense / 3
    macs = {"tensor_train": 0, "tt_conv": 0}
    for name in macs:  # at equal parameters
        kind = FORMATS.get(name)
        family = [r for r in kind.rank_family(SQUARE) if kind.num_params(SQUARE, r) < SQUARE.num_params / 3]
        macs[name] = kind.macs(SQUARE, family[-1], shape)
    assert macs["tt_conv"] > 2 * macs["tensor_train"]


def test_one_pair_of_matrices_where_the_outer_bonds_are_full():
    kind = FORMATS.get("tt_matrix")
    spec = LayerSpec(kind="linear", in_channels=256, out_channels=256, bias=True)
    assert len(kind.structure(spec, named("tt_matrix", 8, 8, 8))) == 4
    first, last = kind.structure(spec, named("tt_matrix", 16, 8, 16))
    assert (first.weight_shape, last.weight_shape) == ((128, 16), (16, 128))
    assert kind.num_params(spec, named("tt_matrix", 16, 8, 16)) == 2 * 16 * 16 * 8 + 256
    assert kind.structure(spec, kind.max_rank(spec)) == (spec,)


def test_the_order_of_the_cores_is_the_best_of_all():
    shapes = ((1, 3, 8, 5), (5, 2, 6, 7), (7, 9, 2, 4), (4, 4, 3, 1))

    def macs(order: tuple[int, ...]) -> int:
        """Contract the cores in any order, also with gaps, every bond left open until both its cores are there."""
        done: set[int] = set()
        total = 0
        for k in order:
            left, m, n, right = shapes[k]
            size = 1
            for j, (a, mj, nj, b) in enumerate(shapes):
                size *= mj if j in done else nj if j != k else 1
                if j in done:
                    size *= 1 if j - 1 in done or j - 1 == k else a
                    size *= 1 if j + 1 in done or j + 1 == k else b
            total += size * left * m * n * right
            done.add(k)
        return total

    assert sum(step.macs for _, step in cheapest(shapes)) == min(macs(order) for order in permutations(range(4)))


@pytest.mark.parametrize("format", ["tensor_train", "tt_conv", "tt_matrix"])
def test_als_knows_the_data(format):
    if format == "tt_matrix":
        spec = LayerSpec(kind="linear", in_channels=36, out_channels=24)
    else:
        spec = LayerSpec(kind="conv", in_channels=12, out_channels=16, kernel=(3, 3))
    generator = torch.Generator().manual_seed(0)
    width = spec.group_shape[2] * torch.Size(spec.kernel).numel()
    mix = torch.randn(width, width, dtype=F64, generator=generator) * torch.linspace(0.05, 2, width, dtype=F64)
    x = (torch.randn(800, width, dtype=F64, generator=generator) @ mix).clamp_min(0)
    family = FORMATS.get(format).rank_family(spec)
    rank = family[len(family) // 2]
    fits = {}
    for name in ("tt_svd", "tt_als"):
        algorithm = DECOMPOSITIONS.get(name)()
        fits[name] = decompose(random_weight(spec), format, rank, algorithm, spec=spec, moments=Moments.of(x))
    assert fits["tt_als"].output_error < 0.95 * fits["tt_svd"].output_error
    value = fits["tt_als"].value.to_grouped().flatten(2)[0]
    centred = x - x.mean(0)
    flat = random_weight(spec).flatten(1)
    seen = (centred @ (flat - value).T).norm() / (centred @ flat.T).norm()
    assert float(seen) == pytest.approx(fits["tt_als"].output_error, rel=1e-6)


def test_als_never_grows_and_settles():
    spec = LayerSpec(kind="conv", in_channels=12, out_channels=16, kernel=(3, 3))
    x = torch.randn(500, 108, dtype=F64, generator=torch.Generator().manual_seed(1)).cumsum(1)
    errors = []
    for sweeps in range(6):
        algorithm = DECOMPOSITIONS.get("tt_als")(n_iter=sweeps, tol=0.0)
        rank, moments = named("tensor_train", 3, 8, 6, 2), Moments.of(x)
        fit = decompose(random_weight(spec), "tensor_train", rank, algorithm, spec=spec, moments=moments)
        errors.append(fit.output_error)
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(errors))
    assert errors[0] - errors[-1] > 0.01


def inputs(width: int) -> torch.Tensor:
    return torch.randn(400, width, dtype=F64, generator=torch.Generator().manual_seed(2)).cumsum(1)


def fitted_distortion(
    weight: torch.Tensor, format: str, spec: LayerSpec, rank: dict[str, int], moments: Moments
) -> float:
    fit = decompose(weight, format, rank, spec=spec, moments=moments)
    return moments.distortion(weight[None].flatten(2), fit.value.to_grouped().flatten(2))


def test_the_distortion_of_tucker2_and_more_where_outer_bonds_are_cut():
    spec = LayerSpec(kind="conv", in_channels=12, out_channels=16, kernel=(3, 3))
    moments, weight = Moments.of(inputs(108)), random_weight(spec)
    curve = error_curve(weight[None], spec, TensorTrain, moments)
    tucker2 = error_curve(weight[None], spec, FORMATS.get("tucker2"), moments)
    pairs = np.array([[8, 6], [12, 4], [16, 12]])
    full = np.pad(pairs, ((0, 0), (1, 1)), constant_values=0) + np.array([4, 0, 0, 4])
    assert curve(full) == pytest.approx(tucker2(pairs), rel=1e-9, abs=1e-9)
    cut = full - np.array([1, 0, 0, 1])
    assert np.all(curve(cut) > 1.1 * curve(full))
    for row, told in zip(cut[:2], curve(cut[:2]), strict=True):
        reached = fitted_distortion(weight, "tensor_train", spec, named("tensor_train", *map(int, row)), moments)
        assert reached < told < 2 * reached


@pytest.mark.parametrize("format", ["tt_matrix", "tt_conv"])
def test_a_few_fits_tell_the_distortion_of_all_ranks(format, monkeypatch):
    if format == "tt_matrix":
        spec = LayerSpec(kind="linear", in_channels=36, out_channels=24)
    else:
        spec = LayerSpec(kind="conv", in_channels=4, out_channels=16, kernel=(3, 3))
    moments, weight = Moments.of(inputs(36)), random_weight(spec)
    kind, fits = FORMATS.get(format), []

    def counted(*args, **kwargs):
        fits.append(args[2])
        return decompose(*args, **kwargs)

    monkeypatch.setattr(curves, "decompose", counted)
    grid = kind.rank_grid(spec, lambda full: range(1, full + 1)).tolist()
    found = error_curve(weight[None], spec, kind, moments)(np.array(grid))
    assert len(fits) == 5
    assert found[grid.index(list(kind.max_rank(spec).values()))] < 1e-6 * found.max()
    middle = [row for row, told in zip(grid, found, strict=True) if 0.2 < told / found.max() < 0.8][::7]
    assert len(middle) > 4
    for row in middle:
        reached = fitted_distortion(weight, format, spec, named(format, *row), moments)
        assert reached / 2 < found[grid.index(row)] < 2 * reached


def test_grids_cost_what_they_cost_one_by_one_and_hold_tucker2():
    conv = LayerSpec(kind="conv", in_channels=24, out_channels=32, kernel=(3, 3), bias=True)
    linear = LayerSpec(kind="linear", in_channels=512, out_channels=512)
    of_conv, of_linear = Call(in_shape=(1, 24, 8, 8), out_shape=(1, 32, 6, 6)), Call(in_shape=(1, 512), out_shape=(1,))
    for format, spec, call in (
        ("tensor_train", conv, of_conv),
        ("tt_conv", conv, of_conv),
        ("tt_matrix", linear, of_linear),
    ):
        cost = Cost(params=spec.num_params, macs=spec.macs(call.in_shape))
        layer = EligibleLayer("layer", spec, (format,), (call,), cost, lambda: torch.zeros(1))
        grid, _ = rows_of(layer, format, layer.load_weight(), rule_from("global"))
        assert len(grid) > 5
        kind, (params, macs) = FORMATS.get(format), costs_of(layer, format, grid)
        for k in range(0, len(grid), 7):
            rank = dict(zip(kind.rank_names, grid[k].tolist(), strict=True))
            assert params[k] == kind.num_params(spec, rank)
            assert macs[k] == kind.macs(spec, rank, call.in_shape)
        if format == "tensor_train":
            assert [4, 16, 12, 6] in grid.tolist()  # Tucker-2
            assert [3, 16, 12, 6] in grid.tolist()
