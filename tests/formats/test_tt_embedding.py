"""The table of an embedding as a tensor train: shapes, padding, and a trained model by plan."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from tenfold import apply, plan, profile
from tenfold.decompositions import decompose
from tenfold.formats import FORMATS
from tenfold.layers import FactorizedLayer, TTEmbedding, build
from tenfold.profiling.latency.grid import measurement_grid
from tenfold.profiling.latency.layer_timer import LayerTimer, neutral_layer
from tenfold.records import LayerSpec, SubLayerSpec, TTGatherSpec

SPEC = LayerSpec(kind="embedding", in_channels=55, out_channels=24, padding_idx=3)


def test_structure_is_one_gather_with_the_parameters_of_the_cores_and_the_padding() -> None:
    (stage,) = FORMATS.get("tt_embedding").structure(SPEC, {"r1": 2, "r2": 3})
    assert isinstance(stage, TTGatherSpec)
    assert stage.shape.row_modes == (3, 4, 5)
    assert stage.shape.col_modes == (4, 3, 2)
    assert stage.num_params == 3 * 4 * 2 + 2 * 4 * 3 * 3 + 3 * 5 * 2 + 24


def test_equals_the_layer_born_as_a_train() -> None:
    torch.manual_seed(0)
    dense = nn.Embedding(55, 24, padding_idx=3)
    fit = decompose(dense.weight.detach(), "tt_embedding", {"r1": 4, "r2": 5}, spec=SPEC)
    layer = FactorizedLayer.of(fit.value)
    born = TTEmbedding.from_embedding(dense, (4, 5), row_modes=(3, 4, 5), col_modes=(4, 3, 2))
    ids = torch.arange(55)
    torch.testing.assert_close(layer(ids), born(ids), atol=1e-5, rtol=1e-4)


def test_the_padding_row_is_kept_as_it_is_and_no_gradient_reaches_it() -> None:
    torch.manual_seed(0)
    weight = torch.randn(55, 24)
    layer = FactorizedLayer.of(decompose(weight, "tt_embedding", {"r1": 1, "r2": 1}, spec=SPEC).value)
    out = layer(torch.full((2, 300), 3))
    torch.testing.assert_close(out, weight[3].expand(2, 300, 24))
    out.sum().backward()
    assert not bool(layer.stages[0].weight.grad.any())  # type: ignore[union-attr]


def test_a_trained_embedding_by_plan() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(1000, 64), nn.Linear(64, 5)).eval()
    ids = torch.randint(1000, (4, 20))
    cost = profile(model, ids)
    made = plan(
        model, cost, {"rule": {"name": "ratio", "share": 0.2, "of": "params"}, "formats": ["tt_embedding", "low_rank"]}
    )
    assert made.layer("0").format == "tt_embedding"
    small = apply(model, made)
    table = small[0].weight  # type: ignore[index]
    torch.testing.assert_close(small[0](ids), table[ids])  # type: ignore[index]
    assert sum(p.numel() for p in small[0].parameters()) <= 0.2 * 64_000  # type: ignore[index]


def test_the_clock_and_the_gate_can_build_and_time_it() -> None:
    found = measurement_grid("tt_embedding", SPEC, (4, 7))
    point = found.levels[0][0]
    assert point.family.startswith("gather")
    assert all(found.curve(p, *map(np.array, p.at)) is not None for level in found.levels for p in level)
    assert LayerTimer("cpu", torch.float32, "contiguous")(point.spec, (4, 7)) > 0
    stage: SubLayerSpec = point.spec
    out = neutral_layer(stage, torch.empty(0))(torch.arange(1, 3))
    assert 0.1 < float(out.detach().abs().mean()) < 10
    assert build(stage, nn.Parameter(torch.zeros(stage.weight_shape)))(torch.tensor([1])).shape == (1, 24)
