"""Further compression of factors equals going through the dense weight, and costs what the factors cost."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tenfold.decompositions import decompose, default_algorithm, layer_request, recompress
from tenfold.decompositions.svd import SVD
from tenfold.errors import PlanError, RankError, WeightError
from tenfold.formats import FORMATS, Factorization, Rank
from tenfold.layers import FactorizedLayer
from tenfold.planning import plan
from tenfold.profiling import profile
from tenfold.records import LayerSpec
from tenfold.surgery import apply

CONV = {"kind": "conv", "in_channels": 12, "out_channels": 16, "kernel": (3, 3)}
CASES: dict[str, tuple[dict[str, Any], str, Rank, Rank]] = {
    "linear": ({"kind": "linear", "in_channels": 20, "out_channels": 14}, "low_rank", {"rank": 9}, {"rank": 4}),
    "embedding": ({"kind": "embedding", "in_channels": 30, "out_channels": 8}, "low_rank", {"rank": 5}, {"rank": 2}),
    "conv": (CONV, "low_rank", {"rank": 10}, {"rank": 6}),
    "grouped": (CONV | {"groups": 2}, "low_rank", {"rank": 6}, {"rank": 3}),
    "transposed": (CONV | {"kind": "conv_transpose"}, "low_rank", {"rank": 10}, {"rank": 6}),
    "spatial": (CONV, "spatial", {"rank": 20}, {"rank": 7}),
    "spatial grouped": (CONV | {"groups": 4}, "spatial", {"rank": 5}, {"rank": 2}),
    "spatial 3d": (CONV | {"kernel": (3, 2, 2)}, "spatial", {"rank": 12}, {"rank": 5}),
    "tucker2": (CONV, "tucker2", {"out": 10, "in": 8}, {"out": 6, "in": 5}),
    "tucker2 one side": (CONV, "tucker2", {"out": 10, "in": 8}, {"out": 10, "in": 4}),
    "partial": (CONV, "tucker2", {"out": 10, "in": 12}, {"out": 6, "in": 12}),
    "partial, then both": (CONV, "tucker2", {"out": 16, "in": 8}, {"out": 9, "in": 6}),
    "tucker2 grouped": (CONV | {"groups": 2}, "tucker2", {"out": 6, "in": 5}, {"out": 4, "in": 3}),
    "tucker2 transposed": (
        CONV | {"kind": "conv_transpose", "stride": (2, 2), "output_padding": (1, 1)},
        "tucker2",
        {"out": 10, "in": 8},
        {"out": 6, "in": 5},
    ),
    "tucker2 1d": (CONV | {"kernel": (5,)}, "tucker2", {"out": 10, "in": 8}, {"out": 5, "in": 4}),
}


def tuned(spec: LayerSpec, format: str, rank: Rank, dtype: torch.dtype = torch.float64, seed: int = 0) -> Factorization:
    """Return factors as training leaves them: neither orthonormal nor balanced."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(spec.weight_shape, generator=generator, dtype=torch.float64)
    found = decompose(weight, format, rank, spec=spec).value
    noisy = {
        k: v * (torch.arange(v.shape[1]) + 1.0).view(-1, *[1] * (v.dim() - 2))
        + torch.randn(v.shape, generator=generator, dtype=v.dtype)
        for k, v in found.tensors().items()
    }
    return found.map(**noisy).to(dtype)


@pytest.mark.parametrize("case", CASES)
def test_equals_going_through_the_dense_weight(case: str) -> None:
    fields, format, before, after = CASES[case]
    spec = LayerSpec(**fields)
    value = tuned(spec, format, before)
    algorithm = SVD(method="full") if format != "tucker2" else default_algorithm(format)
    small, _ = layer_request(value, format, after, algorithm)
    assert small.weight.numel() < value.to_dense().numel()
    found = recompress(value, format, after, algorithm)
    dense = decompose(value.to_dense(), format, after, algorithm, spec=spec)
    assert found.value.rank == dense.value.rank == FORMATS.get(format).check_rank(spec, after)
    assert found.value.spec == spec
    assert 0.01 < found.rel_error < 1
    assert found.rel_error == pytest.approx(dense.rel_error, rel=1e-10)
    assert found.n_iter <= dense.n_iter  # a side that keeps its rank is solved at once
    torch.testing.assert_close(found.value.to_dense(), dense.value.to_dense(), rtol=1e-8, atol=1e-8)
    missed = torch.linalg.vector_norm(found.value.to_dense() - value.to_dense())
    assert float(missed / torch.linalg.vector_norm(value.to_dense())) == pytest.approx(found.rel_error, rel=1e-10)


def test_the_optimum_of_eckart_and_young_from_deficient_factors() -> None:
    left = torch.randn(1, 40, 6, dtype=torch.float64)
    left[..., 5] = left[..., 4]  # rank 5 at most
    right = torch.randn(1, 6, 30, dtype=torch.float64)
    spec = LayerSpec(kind="linear", in_channels=30, out_channels=40)
    value = FORMATS.get("low_rank")(spec, left=left, right=right)
    values = torch.linalg.svdvals(value.to_dense())
    for rank in range(1, 6):
        wanted = float((values[rank:].square().sum() / values.square().sum()).sqrt())
        assert recompress(value, "low_rank", {"rank": rank}).rel_error == pytest.approx(wanted, abs=1e-12)


def test_zero_and_broken_factors() -> None:
    spec = LayerSpec(**CONV)
    value = tuned(spec, "tucker2", {"out": 10, "in": 8})
    zero = recompress(value.map(core=torch.zeros_like(value.core)), "tucker2", {"out": 4, "in": 4})  # type: ignore[attr-defined]
    assert not zero.value.to_dense().any()
    with pytest.raises(WeightError, match="NaN or infinite"):
        recompress(value.map(core=value.core * float("nan")), "tucker2", {"out": 4, "in": 4})  # type: ignore[attr-defined]
    with pytest.raises(RankError, match=r"outside 1\.\.16"):
        recompress(value, "tucker2", {"out": 99})


@pytest.mark.parametrize(
    ("format", "rank"),
    [("low_rank", {"rank": 4}), ("tucker2", {"out": 12, "in": 4}), ("spatial", {"rank": 7})],
)
def test_other_formats_and_larger_ranks_go_through_the_dense_weight(format: str, rank: Rank) -> None:
    spec = LayerSpec(**CONV)
    value = tuned(spec, "tucker2", {"out": 10, "in": 8})
    problem, _ = layer_request(value, format, rank, default_algorithm(format))
    assert problem.weight.shape == spec.weight_shape
    found, dense = recompress(value, format, rank), decompose(value.to_dense(), format, rank, spec=spec)
    assert found.rel_error == pytest.approx(dense.rel_error, rel=1e-9)
    torch.testing.assert_close(found.value.to_dense(), dense.value.to_dense())


def test_nearly_full_factors_are_multiplied_out() -> None:
    spec = LayerSpec(kind="linear", in_channels=20, out_channels=20)
    value = tuned(spec, "low_rank", {"rank": 19})
    assert layer_request(value, "low_rank", {"rank": 4}, SVD())[0].spec == spec


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_keep_theirs_and_tell_the_error_of_what_is_stored(dtype: torch.dtype) -> None:
    spec = LayerSpec(**CONV)
    value = tuned(spec, "tucker2", {"out": 10, "in": 8}, dtype)
    found = recompress(value, "tucker2", {"out": 10, "in": 7})
    assert {t.dtype for t in found.value.tensors().values()} == {dtype}
    exact = value.to(torch.float64).to_dense()
    missed = torch.linalg.vector_norm(found.value.to(torch.float64).to_dense() - exact)
    assert found.rel_error == pytest.approx(float(missed / torch.linalg.vector_norm(exact)), rel=1e-3)


def test_factors_that_do_not_fit_into_half_precision_are_refused() -> None:
    spec = LayerSpec(kind="linear", in_channels=32, out_channels=32)
    value = FORMATS.get("low_rank")(
        spec, left=torch.full((1, 32, 4), 6e4).half(), right=torch.full((1, 4, 32), 6e4).half()
    )
    with pytest.raises(WeightError, match=r"overflow torch\.float16"):
        recompress(value, "low_rank", {"rank": 1})


def flops(run: Any) -> int:
    """Return the FLOPs of ``run``, decompositions counted by their textbook costs."""

    def qr(shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        *batch, m, n = shape
        return math.prod(batch) * 4 * m * n * min(m, n)

    def eigh(shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        *batch, _, n = shape
        return math.prod(batch) * 9 * n**3

    def svd(shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        *batch, m, n = shape
        return math.prod(batch) * 14 * m * n * min(m, n)

    aten = torch.ops.aten
    own = {aten.linalg_qr: qr, aten._linalg_eigh: eigh, aten._linalg_svd: svd}
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("format", "before", "after", "times"),
    [
        ("low_rank", {"rank": 24}, {"rank": 12}, 10),
        ("spatial", {"rank": 24}, {"rank": 12}, 20),
        ("tucker2", {"out": 24, "in": 24}, {"out": 12, "in": 12}, 20),
        ("tucker2", {"out": 128, "in": 24}, {"out": 64, "in": 12}, 2),
    ],
)
def test_costs_a_fraction_of_the_dense_way(format: str, before: Rank, after: Rank, times: float) -> None:
    spec = LayerSpec(kind="conv", in_channels=128, out_channels=128, kernel=(3, 3))
    structure = FORMATS.get(format).structure(spec, before)
    weights: list[Tensor] = [torch.randn(s.weight_shape) for s in structure]
    value = FORMATS.get(format).from_stages(spec, before, weights)
    direct = flops(lambda: recompress(value, format, after))
    dense = flops(lambda: decompose(value.to_dense(), format, after, spec=spec))
    assert dense > times * direct > 0


def stage(net: nn.Module, inputs: Tensor, share: float, of: str, format: str) -> tuple[nn.Module, Any]:
    made = plan(net, profile(net, inputs), {"rule": {"name": "ratio", "share": share, "of": of}, "formats": [format]})
    return apply(net, made), made


@pytest.mark.parametrize("of", ["params", "macs"])
def test_ratio_divides_the_rank_of_a_matrix_by_the_rate_at_every_stage(of: str) -> None:
    net = nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 64, bias=False))
    inputs, ranks = torch.zeros(2, 64), []
    for _ in range(4):
        net, made = stage(net, inputs, 1 / 1.5, of, "low_rank")
        ranks.append(made.layer("0").rank["rank"])
    assert ranks == [21, 14, 9, 6]  # 64·64/(1.5·128) = 21.3, then R/1.5 rounded down: MUSCO's rule


@pytest.mark.parametrize("of", ["params", "macs"])
def test_ratio_keeps_its_share_of_a_tucker_layer_at_every_stage(of: str) -> None:
    net = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1))
    inputs = torch.zeros(1, 32, 8, 8)
    for _ in range(3):
        net, made = stage(net, inputs, 0.6, of, "tucker2")
        for layer in made.factorized:
            before, after = getattr(layer.before, of), getattr(layer.after, of)
            assert 0.5 < after / before <= 0.6
    assert len(made.factorized) == 2


def test_apply_takes_the_short_way_on_factorized_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 24, 3))
    inputs = torch.randn(2, 32, 8, 8)
    first, _ = stage(net, inputs, 0.5, "params", "tucker2")
    made = plan(first, profile(first, inputs), {"rule": {"name": "ratio", "share": 0.5}, "formats": ["tucker2"]})
    by_hand = {
        layer.path: recompress(first.get_submodule(layer.path).factorization(), "tucker2", layer.rank or {})  # type: ignore[operator]
        for layer in made.factorized
    }
    assert len(by_hand) == 3
    monkeypatch.setattr(FactorizedLayer, "weight", property(lambda self: pytest.fail("the weight was multiplied out")))
    second = apply(first, made)
    for path, fit in by_hand.items():
        layer: Any = second.get_submodule(path)
        assert layer.fit.rel_error == pytest.approx(fit.rel_error, rel=1e-3)  # equal ones sweep together
        assert layer.rank == fit.value.rank


def test_an_error_of_a_factorized_layer_names_it() -> None:
    net = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    first, _ = stage(net, torch.zeros(1, 32), 0.5, "macs", "low_rank")
    made = plan(first, profile(first, torch.zeros(1, 32)), {"rule": {"name": "ratio", "share": 0.5}})
    with torch.no_grad():
        first[2].stages[0].weight[0, 0] = float("inf")  # type: ignore[index, union-attr]
    with pytest.raises(PlanError, match="layer '2'"):
        apply(first, made)
