"""Costs of rows are exactly those of their ranks; distortions are exact tails; a grid has all that is cheaper."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tenfold.allocation import rule_from, select
from tenfold.decompositions import decompose
from tenfold.errors import RankError, UnknownNameError
from tenfold.formats import FORMATS, Rank
from tenfold.layers import spec_of
from tenfold.planning import plan
from tenfold.planning.eligible import EligibleLayer, costs_of, saves
from tenfold.planning.error_curves import weight_curve
from tenfold.planning.rows import rows_of, without_idle_factors
from tenfold.profiling import profile
from tenfold.records import Call, Cost, FormatOptions, ForwardTime, LayerOptions, LayerSpec, OptionTable, Recipe
from tenfold.surgery import apply

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


def layer_of(
    spec: LayerSpec, *, current: tuple[str, Rank] | None = None, weight: Tensor | None = None
) -> EligibleLayer:
    made = torch.randn(spec.group_shape, generator=torch.Generator().manual_seed(0)) if weight is None else weight
    names = ("tucker2", "low_rank", "spatial")
    formats = tuple(n for n in names if FORMATS.get(n).unsupported_reason(spec) is None)
    match spec.kind:
        case "linear":
            shapes = [(2, 7, spec.in_channels), (5, spec.in_channels)]
        case "embedding":
            shapes = [(2, 7)]
        case _:
            shapes = [(2, spec.in_channels, *(13, 10)[: spec.axes]), (1, spec.in_channels, *(6, 6)[: spec.axes])]
    calls = tuple(Call(in_shape=shape, count=1 + n) for n, shape in enumerate(shapes))
    cost = Cost(params=spec.num_params, macs=sum(spec.macs(c.in_shape) * c.count for c in calls))
    layer = EligibleLayer("layer", spec, formats, calls, cost, lambda: made)
    if current is None:
        return layer
    return EligibleLayer("layer", spec, formats, calls, layer.cost_at(*current), lambda: made, current)


def grid(layer: EligibleLayer, format: str, step: int | None = None) -> np.ndarray:
    ranks, _ = rows_of(layer, format, layer.load_weight(), rule_from("global", step=step))
    return ranks


@pytest.mark.parametrize("name", SPECS)
def test_costs_are_exact_on_the_whole_grid(name: str) -> None:
    layer = layer_of(SPECS[name])
    g = np.random.default_rng(0)
    for format in layer.formats:
        kind = FORMATS.get(format)
        full = kind.max_rank(layer.spec)
        ranks = np.stack([g.integers(1, full[n] + 1, size=60) for n in kind.rank_names], axis=1)
        ranks[:20, 0] = full[kind.rank_names[0]]  # the sides that have no factor at full rank
        ranks[15:35, -1] = full[kind.rank_names[-1]]
        params, macs = costs_of(layer, format, ranks)
        for row, p, m in zip(ranks.tolist(), params, macs, strict=True):
            assert layer.cost_at(format, dict(zip(kind.rank_names, row, strict=True))) == Cost(params=p, macs=m)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("step", [None, 1, 8])
def test_the_grid_has_all_that_is_cheaper(name: str, step: int | None) -> None:
    layer = layer_of(SPECS[name])
    for format in layer.formats:
        kind, ranks = FORMATS.get(format), grid(layer, format, step)
        assert saves(layer, *costs_of(layer, format, ranks)).all()
        assert grid(layer, format, step).tolist() == ranks.tolist()
        full = [kind.max_rank(layer.spec)[n] for n in kind.rank_names]
        if step != 1 or max(full) > 60:
            continue  # too many to look at one by one
        every = [[i + 1 for i in row] for row in np.ndindex(*full)]  # nothing that is cheaper is left out
        cheaper = [
            r for r in every if layer.cost_at(format, dict(zip(kind.rank_names, r, strict=True))).below(layer.cost)
        ]
        assert ranks.tolist() == cheaper


def test_grid_has_multiples_and_full_sides() -> None:
    layer = layer_of(LayerSpec(**CONV, in_channels=128, out_channels=100))
    tucker = grid(layer, "tucker2")
    assert set(tucker[:, 0]) == {*range(8, 100, 8), 100}
    assert set(tucker[:, 1]) == {*range(8, 128, 8), 128}
    assert [100, 64] in tucker.tolist()
    assert [24, 128] in tucker.tolist()
    assert [100, 128] not in tucker.tolist()
    assert tucker.tolist() == sorted(tucker.tolist())
    low_rank = grid(layer, "low_rank")
    assert low_rank[:, 0].tolist() == [*range(8, 100, 8)][: len(low_rank)]


@pytest.mark.parametrize(("channels", "step"), [(16, 1), (32, 2), (64, 4), (72, 8), (512, 8)])
def test_small_layers_have_finer_grids(channels: int, step: int) -> None:
    layer = layer_of(LayerSpec(**CONV, in_channels=channels, out_channels=channels))
    assert np.unique(grid(layer, "tucker2")[:, 0])[:3].tolist() == [step, 2 * step, 3 * step]


def test_factorized_layer_only_goes_further() -> None:
    layer = layer_of(SPECS["conv"], current=("tucker2", {"out": 32, "in": 24}))
    ranks = grid(layer, "tucker2")
    assert len(ranks)
    assert saves(layer, *costs_of(layer, "tucker2", ranks)).all()
    assert [32, 24] not in ranks.tolist()


@pytest.mark.parametrize("step", [0, -8, 2.0, True])
def test_steps_that_cannot_be(step: int) -> None:
    with pytest.raises(RankError, match="step"):
        rule_from("global", step=step)


def test_unknown_rows_are_refused_with_near_ones() -> None:
    class Lost(type(rule_from("ratio"))):  # type: ignore[misc]
        rows = "famly"

    with pytest.raises(UnknownNameError, match=r"unknown rows 'famly'\. Did you mean family"):
        rows_of(layer_of(SPECS["conv"]), "tucker2", torch.empty(0), Lost())


# ---- distortions by the weights


@pytest.mark.parametrize(
    ("name", "format"),
    [(n, "low_rank") for n in ("conv", "grouped", "transposed", "linear", "embedding")]
    + [(n, "spatial") for n in ("conv", "grouped", "transposed", "wide kernel")],
)
def test_distortion_of_one_unfolding_is_what_the_svd_loses(name: str, format: str) -> None:
    layer = layer_of(SPECS[name])
    matrix = next(iter(FORMATS.get(format).unfoldings(layer.load_weight().double(), layer.spec).values()))
    squares = torch.linalg.svdvals(matrix).square()
    ranks = np.array([[1], [3], [squares.shape[1]]])
    expected = [float(squares[:, r:].sum() / squares.sum()) for r in ranks[:, 0]]
    found = weight_curve(layer, format, layer.load_weight())(ranks)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)


def test_distortion_of_tucker2_bounds_the_error_closely() -> None:
    layer = layer_of(LayerSpec(**CONV, in_channels=24, out_channels=32))
    ranks, weight = np.array([[8, 8], [16, 12], [32, 12], [16, 24], [31, 23]]), layer.load_weight()
    for (out, inner), estimate in zip(ranks.tolist(), weight_curve(layer, "tucker2", weight)(ranks), strict=True):
        error = decompose(weight[0], "tucker2", {"out": out, "in": inner}).rel_error ** 2
        assert error <= estimate * (1 + 1e-5)
        assert estimate <= 2 * error * (1 + 1e-5)
        if out == 32 or inner == 24:  # one side alone: the SVD of one unfolding, exactly
            assert estimate == pytest.approx(error, rel=1e-4)


def test_distortion_falls_with_rank_and_is_zero_at_full_rank() -> None:
    layer = layer_of(SPECS["first"])
    every = np.stack(np.meshgrid(np.arange(1, 65), np.arange(1, 4), indexing="ij"), -1).reshape(-1, 2)
    table = weight_curve(layer, "tucker2", layer.load_weight())(every).reshape(64, 3)
    assert (np.diff(table, axis=0) <= 0).all()
    assert (np.diff(table, axis=1) <= 0).all()
    assert table[-1, -1] == 0
    assert table.max() <= 1
    dead = torch.zeros(SPECS["conv"].group_shape)
    assert weight_curve(layer_of(SPECS["conv"]), "tucker2", dead)(np.array([[1, 1]])).tolist() == [0]


# ---- factors that cost more than they save


def conv(stride: int = 1) -> EligibleLayer:
    spec = spec_of(nn.Conv2d(64, 64, 3, padding=1, stride=stride))[0]
    assert isinstance(spec, LayerSpec)
    call = Call(in_shape=(1, 64, 8, 8))
    cost = Cost(params=spec.num_params, macs=spec.macs(call.in_shape))
    return EligibleLayer("conv", spec, ("tucker2",), (call,), cost, lambda: torch.empty(0))


def test_a_factor_that_costs_more_than_it_saves_goes() -> None:
    ranks, becomes, notes = without_idle_factors(conv(), "tucker2", np.array([[20, 20], [20, 62]]))
    assert (ranks.tolist(), becomes) == ([[20, 64]], {1: 0})
    assert notes == {1: "; in 62 made full: cheaper without that factor"}
    stages = FORMATS.get("tucker2").structure(conv().spec, {"out": 20, "in": 64})
    assert [s.weight_shape for s in stages] == [(20, 64, 3, 3), (64, 20, 1, 1)]


@pytest.mark.parametrize("rank", [[20, 20], [20, 64], [40, 44]])
def test_what_saves_something_stays(rank: list[int]) -> None:
    ranks, becomes, _ = without_idle_factors(conv(), "tucker2", np.array([rank]))
    assert (len(ranks), becomes) == (0, {})


def test_fewer_parameters_for_more_multiplications_are_no_bargain() -> None:
    """Of a strided layer the factor in front runs at every position, and the core at a quarter of them."""
    layer, rows = conv(stride=2), np.array([[20, most] for most in range(40, 64)])
    fuller, becomes, _ = without_idle_factors(layer, "tucker2", rows)
    before, after = costs_of(layer, "tucker2", rows), costs_of(layer, "tucker2", fuller)
    for row, other in becomes.items():
        assert after[0][other] <= before[0][row]
        assert after[1][other] <= before[1][row]


@pytest.mark.parametrize(("slow", "taken"), [(0.5, 64), (2.0, 62)])
def test_nothing_is_made_full_that_measures_slower(slow: float, taken: int) -> None:
    def options(rank: list[int], milliseconds: float, distortion: float, **more: object) -> FormatOptions:
        layer, row = conv(), np.array([rank])
        params, macs = costs_of(layer, "tucker2", row)
        return FormatOptions(
            format="tucker2",
            names=("out", "in"),
            ranks=row,
            params=params,
            macs=macs,
            latency_ms=[milliseconds],
            columns={"distortion": [distortion]},
            **more,
        )

    own = options([20, 62], 0.5, 1 / 1240, fuller=options([20, 64], slow, 1 / 1280), becomes={0: 0}, notes={0: "; so"})
    layer = LayerOptions(path="conv", before=conv().cost, latency_ms=9.0, options=(own,))
    made = OptionTable(
        tenfold="",
        model="",
        recipe=Recipe.of("macs=0.9"),
        before=conv().cost,
        layers=(layer,),
        time=ForwardTime(dense_ms=9.0, whole_ms=9.0),
    )
    (pick,) = select(made, made.recipe).picks
    assert (pick.rank or {})["in"] == taken
    assert pick.distortion == pytest.approx(1 / (20 * taken))
    assert ("; so" in pick.reason) == (taken == 64)


def test_plans_have_no_such_ranks_unless_somebody_asked_for_them() -> None:
    model, x = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1)), torch.randn(1, 32, 6, 6)
    with torch.no_grad():  # few outputs, and nearly all inputs
        narrow = torch.randn(32, 8) @ torch.randn(8, 31 * 9)
        model[0].weight.copy_(
            torch.einsum("oik,ij->ojk", narrow.view(32, 31, 9), torch.randn(31, 32)).view(32, 32, 3, 3)
        )
    cost = profile(model, x)
    options = {"formats": "tucker2", "keep_ends": False}
    made = plan(model, cost, {"rule": {"name": "energy", "rel_error": 1e-3}, **options})
    assert made.layer("0").rank == {"out": 8, "in": 32}
    assert "in 31 made full" in made.layer("0").reason
    assert profile(apply(model, made), x).cost == made.after
    asked = plan(model, cost, {"rule": {"name": "fixed", "ranks": {"0": {"out": 8, "in": 31}}}, **options})
    assert asked.layer("0").rank == {"out": 8, "in": 31}
