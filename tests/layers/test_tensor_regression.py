"""Tensor contraction and regression: the dense layer of the flattened map with the same weight is the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tenfold import export, profile
from tenfold.decompositions import Moments
from tenfold.errors import RankError, WeightError
from tenfold.layers import (
    CPRegression,
    MapLinear,
    TensorContraction,
    TensorRegression,
    TTRegression,
    TuckerRegression,
)

MAPS = [(6, 4, 3), (5, 7), (4, 2, 3, 2)]
MADE: dict[str, Any] = {
    "tucker": lambda modes, **more: TuckerRegression(modes, 5, (3, *[2] * (len(modes) - 1), 4), **more),
    "tucker, some modes whole": lambda modes, **more: TuckerRegression(
        modes, 5, (None, 2, *[None] * (len(modes) - 1)), **more
    ),
    "cp": lambda modes, **more: CPRegression(modes, 5, 6, **more),
    "tt": lambda modes, **more: TTRegression(modes, 5, 3, **more),
}


@pytest.mark.parametrize("modes", MAPS)
@pytest.mark.parametrize("name", MADE)
def test_it_is_the_linear_layer_of_its_weight_and_costs_what_it_says(name: str, modes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer: TensorRegression = MADE[name](modes, dtype=torch.float64)
    x = torch.randn(3, *modes, dtype=torch.float64)
    with torch.no_grad():
        nn.init.normal_(layer.get_parameter("bias"))
    dense = layer.to_linear()
    assert dense.in_modes == modes
    with FlopCounterMode(display=False) as counter:
        found = layer(x)
    torch.testing.assert_close(found, dense(x.flatten(1)))
    assert counter.get_total_flops() == 2 * layer.macs(3)
    assert torch.equal(layer(x.flatten(1)), found)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x.requires_grad_(), *layer.parameters()))


@pytest.mark.parametrize("name", MADE)
def test_weights_begin_as_those_of_a_linear_layer(name: str) -> None:
    torch.manual_seed(0)
    layer: TensorRegression = MADE[name]((6, 4, 3))
    power = float(layer.weight.detach().square().mean())
    # The norm of a Tucker weight is that of its random core; of the others it is set exactly.
    assert power == pytest.approx(1 / (3 * 72), rel=0.5 if name.startswith("tucker") else 1e-4)


@pytest.mark.parametrize("kind", [TuckerRegression, CPRegression, TTRegression])
@pytest.mark.parametrize("size", [(4, 6), (5,), (2, 3, 2)])
def test_a_head_behind_a_global_pooling_is_exact(kind: Any, size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    dense, x = nn.Linear(12, 5).eval(), torch.randn(4, 12, *size)
    layer = kind.from_pooled(dense, size)
    wanted = dense(x.flatten(2).mean(2))
    assert float((layer(x) - wanted).detach().abs().max()) < 1e-6
    assert not layer.training
    narrow = kind.from_pooled(dense, size, 2)
    u, s, v = torch.linalg.svd(dense.weight.detach())
    nearest = nn.functional.linear(x.flatten(2).mean(2), u[:, :2] * s[:2] @ v[:2], dense.bias)
    torch.testing.assert_close(narrow(x), nearest, rtol=0, atol=1e-5)


def _seen(modes: tuple[int, ...], rows: int = 800) -> Tensor:
    """Return maps whose neighbours are alike, as those of networks are, and some channels louder than others."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(rows, *modes, generator=draw)
    for axis in range(2, len(modes) + 1):
        x = x + x.roll(1, axis)
    return (x * torch.logspace(0, -1, modes[0]).view(-1, *[1] * (len(modes) - 1))).relu()


CASES: list[tuple[Any, Any]] = [
    (TuckerRegression, {"out": 4, "in": 3, "height": 2, "width": 2}),
    (CPRegression, 6),
    (TTRegression, (4, 6, 4)),
]


@pytest.mark.parametrize(("kind", "rank"), CASES)
def test_data_bring_the_outputs_of_a_trained_head_nearer(kind: Any, rank: Any) -> None:
    torch.manual_seed(0)
    modes = (6, 4, 4)
    dense, x = nn.Linear(96, 8), _seen(modes)
    wanted = dense(x.flatten(1))
    blind = kind.from_linear(dense, modes, rank)
    aware = kind.from_linear(dense, modes, rank, Moments.of(x.flatten(1).double()))

    def missed(layer: nn.Module) -> float:
        return float((layer(x) - wanted).detach().var(0).sum())  # about the mean: the bias is that of the trained layer

    assert missed(aware) < 0.8 * missed(blind)
    assert torch.equal(aware.bias, dense.bias)


@pytest.mark.parametrize(("kind", "rank"), [(TuckerRegression, {}), (TTRegression, 99)])
@pytest.mark.parametrize("modes", [(8, 3, 4), (6, 9)])
def test_a_trained_head_at_full_rank_is_exact(kind: Any, rank: Any, modes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, *modes)
    dense = nn.Linear(x[0].numel(), 7, bias=False)
    layer = kind.from_linear(dense, modes, rank)
    torch.testing.assert_close(layer(x), dense(x.flatten(1)), rtol=0, atol=2e-6)
    assert layer.bias is None


def test_contraction_multiplies_each_mode() -> None:
    torch.manual_seed(0)
    layer, x = TensorContraction((6, 5, 4), (3, None, 2), bias=True), torch.randn(2, 6, 5, 4)
    nn.init.normal_(layer.get_parameter("bias"))
    first, last = layer.factors["0"], layer.factors["2"]
    torch.testing.assert_close(layer(x), torch.einsum("bchw,rc,sw->brhs", x, first, last) + layer.bias)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * layer.macs(2)


@pytest.mark.parametrize("name", MADE)
def test_it_is_saved_profiled_and_exported(name: str) -> None:
    torch.manual_seed(0)
    layer: TensorRegression = MADE[name]((6, 4, 3)).eval()
    other: TensorRegression = MADE[name]((6, 4, 3)).eval()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 6, 4, 3)
    assert torch.equal(layer(x), other(x))
    cost = profile(layer, x)
    assert (cost.macs, cost.params) == (layer.macs(2), sum(p.numel() for p in layer.parameters()))
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))


def test_it_runs_in_onnx_runtime(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    layers = [made((6, 4, 3)) for made in MADE.values()]
    heads = _Side(nn.ModuleList(layers)).eval()
    file = tmp_path / "heads.onnx"
    export(heads, torch.randn(2, 6, 4, 3), file)  # which runs the file, and compares
    assert file.stat().st_size > 0


class _Side(nn.Module):
    """All heads side by side: one export for all of them."""

    def __init__(self, heads: nn.ModuleList) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([head(x) for head in self.heads], 1)


def test_bad_input_is_told() -> None:
    dense = nn.Linear(72, 5)
    for kind, rank in CASES:
        with pytest.raises(WeightError, match="has 60 entries, the layer takes 72: pass"):
            kind.from_linear(dense, (5, 4, 3), rank)
    with pytest.raises(WeightError, match="72: pass"):
        MapLinear.of(dense, (5, 4, 3))
    with pytest.raises(WeightError, match=r"takes \(batch, 6, 4, 3\) or \(batch, 72\), not \(2, 6, 8, 3\)"):
        CPRegression((6, 4, 3), 5, 2)(torch.zeros(2, 6, 8, 3))
    with pytest.raises(WeightError, match="one for each mode"):
        TuckerRegression((6, 4, 3), 5, (3, 2, 2))
    with pytest.raises(WeightError, match="sizes ≥ 1"):
        CPRegression((), 5, 2)
    with pytest.raises(RankError, match="at least 1"):
        CPRegression((6, 4, 3), 5, 0)
    with pytest.raises(RankError, match="a number ≥ 1, or None"):
        TensorContraction((6, 4), (3, 0))
    with pytest.raises(RankError, match=r"outside 1\.\.6"):
        TuckerRegression.from_linear(dense, (6, 4, 3), {"in": 7})
