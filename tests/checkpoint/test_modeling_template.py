"""What the modelling file puts in the place of layers, on modules of our own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tenfold.checkpoint import modeling_template
from tenfold.checkpoint.modeling_template import Chain, rebuild_, resized
from tenfold.layers import PaddedHeads, UnpaddedHeads


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.query(x) * self.key(x)


class Model(nn.Module):
    base_model_prefix = "inner"

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Attention(), Attention()])


def pair(inner: int) -> list[dict[str, Any]]:
    return [
        {"kind": "linear", "in_channels": 6, "out_channels": inner},
        {"kind": "linear", "in_channels": inner, "out_channels": 8, "bias": True},
    ]


@pytest.mark.parametrize("path", ["blocks.1.query", "inner.blocks.1.query"])
def test_blocks_with_other_layers_have_other_children(path: str) -> None:
    model = Model()
    rebuild_(model, {"narrowed": {}, "layers": {path: {"stages": pair(2)}, "head": {"stages": pair(2)}}})
    plain, changed = (tuple(name for name, _ in block.named_children()) for block in model.blocks)
    assert plain == ("query", "key"), "an engine that fuses by class and names of children must not mix them up"
    assert changed == ("query", "key", "replaced_query")
    assert isinstance(model.blocks[1].query, Chain)
    x = torch.randn(3, 6)
    first, last = model.blocks[1].query.stages
    assert torch.equal(model.blocks[1].query(x), last(first(x)))
    assert set(model.state_dict()) >= {"blocks.1.query.stages.0.weight", "blocks.1.query.stages.1.bias"}


def test_the_weight_of_a_chain_answers_for_shape_and_dtype_alone() -> None:
    chain = Chain(nn.Linear(6, 8, dtype=torch.float64), pair(2))
    assert (chain.weight.shape, chain.weight.dtype, chain.in_features) == ((8, 6), torch.float64, 6)
    assert isinstance(chain.weight, Tensor)
    with pytest.raises(NotImplementedError, match="has no entries"):
        chain.weight.sum()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [PaddedHeads, UnpaddedHeads])
def test_narrow_heads_compute_what_those_of_tenfold_do(kind: type[nn.Module], bias: bool) -> None:
    heads, size, full = 3, 2, 4
    dense = nn.Linear(heads * full, heads * full, bias=bias)
    ours: Any = (
        kind(12, heads, size, full, bias=bias) if kind is PaddedHeads else kind(heads, size, full, 12, bias=bias)
    )
    shapes = {name: list(tensor.shape) for name, tensor in ours.state_dict().items()}
    change = {"class": kind.__name__, "shapes": shapes, "attributes": {"heads": heads, "full": full}}
    theirs = resized(dense, change, vars(modeling_template))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 12)
    assert torch.equal(theirs(x), ours(x))
    assert dense.weight.shape == (12, 12), "the layer it takes the place of stays as it is"
