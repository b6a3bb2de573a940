"""Sketched moments: near the exact ones in what they are for, and small."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tenfold.calibration.moment_sums
from tenfold import compress
from tenfold.calibration import calibrate
from tenfold.calibration.collect import collect_moments, measurable
from tenfold.calibration.moment_sums import MomentSums, moment_bytes
from tenfold.decompositions import Sketch, decompose
from tenfold.errors import CalibrationWarning, DataError
from tenfold.layers import FactorizedLayer
from tenfold.planning import plan
from tenfold.profiling import profile
from tenfold.records import Calibration, LayerSpec
from tenfold.runtime import Runtime
from tenfold.surgery import apply
from tenfold.surgery.sequential import SequentialFit, apply_sequentially

WIDTH, OUT = 400, 60
SPEC = LayerSpec(kind="linear", in_channels=WIDTH, out_channels=OUT)


def stream(rows: int, decay: float, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return correlated rows with a mean, whose covariance has the eigenvalues i^-decay."""
    spread = torch.arange(1, WIDTH + 1, dtype=torch.float64) ** (-decay / 2)
    mix = torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64)).Q * spread
    return (torch.randn(rows, WIDTH, dtype=torch.float64) @ mix.T + 0.5).to(dtype)


def taken(x: torch.Tensor, widest: int | None, y: torch.Tensor | None = None, size: int = 64, spec: LayerSpec = SPEC):
    sums = MomentSums(widest)
    targets = [None] * len(x) if y is None else y.split(size)
    for part, target in zip(x.split(size), targets, strict=False):
        sums.add(part, spec, target)
    return sums.moments("layer")


@pytest.mark.parametrize("decay", [1.0, 1.5, 2.0])
def test_low_rank_by_a_sketch_is_within_a_few_percent_of_the_optimum(decay):
    x, weight = stream(1500, decay), torch.randn(OUT, WIDTH, dtype=torch.float64)
    exact, sketched = taken(x, None), taken(x, 250)
    assert isinstance(sketched.input_second_moment, Sketch)
    assert sketched.input_second_moment.rows.shape == (1, 157, WIDTH)
    for rank, near in ((5, 1.01), (20, 1.03), (40, 1.08)):
        best, own, blind = (decompose(weight, "low_rank", {"rank": rank}, moments=m) for m in (exact, sketched, None))
        reached, told = (m.errors(weight[None], own.value.to_grouped()) for m in (exact, sketched))
        least = exact.errors(weight[None], best.value.to_grouped())[0].sum()
        assert float(reached[0].sum()) < near * float(least)
        assert float(reached[0].sum()) < 0.7 * float(exact.errors(weight[None], blind.value.to_grouped())[0].sum())
        assert float(told[0].sum()) == pytest.approx(float(reached[0].sum()), rel=0.15)
        assert float(told[1].sum()) == pytest.approx(float(reached[1].sum()), rel=0.02)


def test_what_is_summed_on_its_own_is_exact_and_the_rest_never_too_much():
    x = stream(900, 1.0, dtype=torch.float64)
    exact, sketched = taken(x, None), taken(x, 100)
    torch.testing.assert_close(sketched.mean, exact.mean)
    torch.testing.assert_close(
        sketched.input_second_moment.diagonal(), exact.input_second_moment.diagonal(dim1=-2, dim2=-1)
    )
    torch.testing.assert_close(
        sketched.covariance().diagonal(), exact.covariance().diagonal(dim1=-2, dim2=-1), rtol=1e-6, atol=1e-9
    )
    rows = sketched.input_second_moment.rows
    assert torch.linalg.eigvalsh(exact.input_second_moment - rows.mT @ rows).min() > -1e-9
    assert sketched.count == exact.count == 900


@pytest.mark.parametrize("rows", [30, 800])
def test_data_of_low_rank_are_kept_exactly(rows):
    x = torch.randn(rows, 20, dtype=torch.float64) @ torch.randn(20, WIDTH, dtype=torch.float64) + 1
    y = x[:, :OUT] * 2 + 1
    exact, sketched = taken(x, None, y), taken(x, 120, y)
    torch.testing.assert_close(sketched.input_second_moment.dense(), exact.input_second_moment)
    torch.testing.assert_close(sketched.covariance().dense(), exact.covariance())
    torch.testing.assert_close(sketched.input_second_moment.targets.mT @ sketched.input_second_moment.rows, exact.cross)
    for name in ("mean", "target_mean", "target_power"):
        torch.testing.assert_close(getattr(sketched, name), getattr(exact, name))


def test_the_sketch_does_not_depend_on_the_batches_but_on_the_seed():
    x = stream(600, 1.0, dtype=torch.float64)
    one, other = taken(x, 100, size=600), taken(x.flip(0), 100, size=7)
    torch.testing.assert_close(one.input_second_moment.dense(), other.input_second_moment.dense())
    reseeded = MomentSums(100, seed=1)
    reseeded.add(x, SPEC)
    assert (reseeded.moments("layer").input_second_moment.dense() - one.input_second_moment.dense()).abs().max() > 1e-4


def test_rows_that_change_in_place_later_are_held_as_they_were():
    x = torch.randn(10, WIDTH)
    sums = MomentSums(100)
    sums.add(x, SPEC)
    wanted = x.double().mean(0)
    x.zero_()
    torch.testing.assert_close(sums.moments("layer").mean[0], wanted)


def test_unchanged_inputs_leave_the_goal_at_the_weight_and_changed_ones_draw_it():
    x, weight = stream(1500, 1.5, dtype=torch.float64), torch.randn(1, OUT, WIDTH, dtype=torch.float64)
    y = x @ weight[0].T
    same = taken(x, 250, y)
    torch.testing.assert_close(same.regression_target(weight, 1e-4), weight)
    assert float(same.errors(weight, weight)[0].max()) < 1e-12
    changed = x + 0.3 * x.roll(1, 1)
    exact, sketched = taken(changed, None, y), taken(changed, 250, y)
    kept, drawn, best = (
        float(exact.errors(weight, t)[0].sum())
        for t in (weight, sketched.regression_target(weight, 1e-4), exact.regression_target(weight, 1e-4))
    )
    assert best < drawn < 0.15 * kept


def test_groups_are_sketched_each_on_its_own():
    spec = LayerSpec(kind="conv", in_channels=40, out_channels=8, kernel=(3, 3), groups=2)
    x = torch.randn(12, 40, 6, 6)
    exact, sketched = taken(x, None, spec=spec, size=5), taken(x, 100, spec=spec, size=5)
    for i in range(2):
        diagonal = exact.input_second_moment[i].diagonal()
        torch.testing.assert_close(sketched.input_second_moment.diagonal()[i], diagonal, rtol=1e-5, atol=1e-6)
    weight = torch.randn(8, 20, 3, 3)
    fit = decompose(weight, "tucker2", {"out": 3, "in": 10}, spec=spec, moments=sketched)
    best = decompose(weight, "tucker2", {"out": 3, "in": 10}, spec=spec, moments=exact)
    assert fit.output_error < 1.2 * best.output_error


class Largest(TorchDispatchMode):
    """Knows the entries of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for value in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(value, torch.Tensor):
                self.entries = max(self.entries, value.untyped_storage().nbytes() // value.element_size())
        return made


def wide() -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1200, 24), nn.ReLU(), nn.Linear(24, 30), nn.ReLU(), nn.Linear(30, 10))
    mix = torch.randn(20, 1200)
    return model, [torch.randn(64, 20) @ mix + 0.05 * torch.randn(64, 1200) for _ in range(6)]


@pytest.mark.parametrize("dense", [False, True])
def test_moments_take_what_was_said_and_never_a_square_of_the_width(dense, caplog):
    model, batches = wide()
    dense_model = copy.deepcopy(model) if dense else None
    caplog.set_level(logging.INFO, "tenfold")
    with pytest.warns(CalibrationWarning, match="has 1200 inputs, and 384 rows"), Largest() as seen:
        found = collect_moments(model, batches, dense=dense_model, widest=200)
    assert "layer '0': inputs 1200 wide, of which a sketch of 33 rows is kept" in caplog.text
    assert seen.entries < 1200 * 100
    tensors = [
        t
        for m in found.values()
        for v in vars(m).values()
        for t in (v.tensors().values() if isinstance(v, Sketch) else [v])
        if isinstance(t, torch.Tensor)
    ]
    said = moment_bytes(measurable(model), targets=dense, widest=200)
    assert said - 4 * 33 * 1200 - 8 * 1200 <= sum(8 * t.numel() for t in tensors) <= said
    assert isinstance(found["2"].input_second_moment, torch.Tensor)


@pytest.mark.parametrize("method", ["sequential", "independent"])
def test_a_wide_model_is_compressed_without_a_square_of_its_width(method, monkeypatch):
    model, batches = wide()
    held = torch.cat(batches[4:])

    def run() -> nn.Module:
        return compress(
            model,
            held[:1],
            {"budget": {"macs": 0.4}, "formats": ["low_rank"], "keep_ends": False, "calibration": {"method": method}},
            data=batches[:4],
            runtime=Runtime(measure=False),
        ).model

    with pytest.warns(CalibrationWarning):
        exact = run()
    monkeypatch.setattr(tenfold.calibration.moment_sums, "WIDEST", 250)
    with pytest.warns(CalibrationWarning), Largest() as seen:
        own = run()
    assert seen.entries < 1200 * 300
    assert isinstance(own[0], FactorizedLayer)
    with torch.no_grad():
        power = model(held).var(0).sum()
        lost, least = (float((m(held) - model(held)).square().sum(1).mean() / power) for m in (own, exact))
    assert lost < 1.1 * least + 0.002


def test_fitting_in_order_by_sketches_is_as_good_and_makes_no_square():
    model, batches = wide()
    todo = plan(model, profile(model, batches[0][:1]), {"rule": "ratio", "budget": {"macs": 0.3}, "keep_ends": False})
    held = torch.cat(batches[4:])
    exact = apply_sequentially(model, todo, batches[:4])
    with Largest() as seen:
        own = apply_sequentially(model, todo, batches[:4], config=SequentialFit(max_width=250))
    assert seen.entries < 1200 * 300
    assert isinstance(own[0], FactorizedLayer)
    with torch.no_grad():
        lost, least, blind = (float((m(held) - model(held)).square().mean()) for m in (own, exact, apply(model, todo)))
    assert lost < 1.2 * least
    assert lost < 0.5 * blind


def test_calibrate_passes_the_limit_on():
    model, batches = wide()
    with pytest.warns(CalibrationWarning):
        found = calibrate(model, batches[:1], settings=Calibration(max_width=100))
    assert isinstance(found["0"].input_second_moment, Sketch)
    assert found["0"].output_gram is not None


@pytest.mark.parametrize("rows", [5, 300])
def test_inputs_that_are_not_finite_are_named(rows):
    with pytest.raises(DataError, match="input of layer 'layer' is not finite"):
        taken(torch.full((rows, WIDTH), float("nan")), 100)
