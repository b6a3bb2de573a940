"""The interpolative format: the weight of low_rank in fewer numbers, in any geometry that it serves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tenfold import apply, load, plan, profile, save
from tenfold.decompositions import Moments, decompose
from tenfold.formats import FORMATS
from tenfold.layers import FactorizedLayer
from tenfold.records import LayerSpec
from tenfold.testing import FORMAT_LAWS, check_format_laws
from tenfold.testing.geometries import Geometry

GROUPED = (
    Geometry(
        "conv1d, pointwise",
        LayerSpec(kind="conv", in_channels=7, out_channels=9, kernel=(1,), bias=True),
        (2, 7, 5),
    ),
    Geometry(
        "conv2d, pointwise, grouped and strided",
        LayerSpec(kind="conv", in_channels=8, out_channels=12, kernel=(1, 1), stride=(2, 1), groups=2, bias=True),
        (2, 8, 5, 4),
    ),
    Geometry(
        "conv3d, pointwise and strided",
        LayerSpec(kind="conv", in_channels=6, out_channels=4, kernel=(1, 1, 1), stride=(1, 2, 3)),
        (2, 6, 4, 5, 4),
    ),
)


@pytest.mark.parametrize("law", FORMAT_LAWS)
def test_laws_of_pointwise_convolutions(law: str) -> None:
    check_format_laws(FORMATS.get("interpolative"), law, GROUPED)


@pytest.mark.parametrize("seen", [False, True])
def test_it_is_the_weight_of_low_rank_with_a_block_of_the_identity(*, seen: bool) -> None:
    torch.manual_seed(0)
    weight, rank = torch.randn(20, 30, dtype=torch.float64), 8
    moments = None
    if seen:
        rows = torch.randn(200, 30).double() @ torch.randn(30, 30).double()
        gram = torch.diag(torch.logspace(0, -3, 20, dtype=torch.float64))[None]
        moments = Moments.of(rows).replace(output_gram=gram)
    found = [decompose(weight, name, {"rank": rank}, moments=moments) for name in ("low_rank", "interpolative")]
    low, own = found
    torch.testing.assert_close(own.value.to_dense(), low.value.to_dense(), rtol=0, atol=1e-8)
    tensors = own.value.tensors()
    block = 30 // tensors["order"].shape[1]
    assert block == 2
    chosen = (tensors["order"][0, : rank // block, None] * block + torch.arange(block)).flatten()
    torch.testing.assert_close(own.value.to_dense()[:, chosen], tensors["columns"][0])
    assert float(tensors["fold"].abs().max()) <= 4
    assert sum(t.numel() for t in tensors.values() if t.is_floating_point()) == rank * (20 + 30) - rank**2


def test_order_is_not_trained_not_cast_and_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 300)).eval()
    x = torch.randn(3, 24)
    made = plan(dense, profile(dense, x), {"rule": {"name": "ratio", "share": 0.7}, "formats": "interpolative"})
    small = apply(dense, made)
    layer = next(module for module in small.modules() if isinstance(module, FactorizedLayer))
    assert {p.dtype for p in layer.half().parameters()} == {torch.float16}
    order = layer.stages[0].weight
    assert order.dtype == torch.int64
    assert not any(p is order for p in layer.parameters())
    layer.float()
    save(small, made, tmp_path / "saved")
    loaded, _ = load(nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 300)).eval(), tmp_path / "saved")
    assert torch.equal(loaded(x), small(x))


def test_a_square_matrix_keeps_more_rank_at_the_same_parameters() -> None:
    square = LayerSpec(kind="linear", in_channels=256, out_channels=256)
    most = {}
    for name in ("low_rank", "interpolative"):
        format = FORMATS.get(name)
        sizes = format.params_at(square, np.arange(1, 257)[:, None])
        most[name] = int((sizes <= 0.8 * 256 * 256).sum())
    assert most == {"low_rank": 102, "interpolative": 141}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kind": "embedding"}, "of a table"),
        ({"kind": "conv", "kernel": (3, 3)}, "beside a kernel"),
        ({"kind": "conv_transpose", "kernel": (1, 1)}, "beside a kernel"),
        ({"kind": "conv", "kernel": (1, 1), "padding": (1, 1)}, "with padding"),
    ],
)
def test_refusals(options: dict[str, object], reason: str) -> None:
    spec = LayerSpec(in_channels=8, out_channels=8, **options)  # type: ignore[arg-type]
    assert reason in str(FORMATS.get("interpolative").unsupported_reason(spec))
