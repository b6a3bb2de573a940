"""Tensor rings as layers: published costs, shared blocks, Tucker-2 and the dense layer as special cases."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.nn import functional

from tenfold.allocation import rule_from
from tenfold.formats import FORMATS
from tenfold.formats.tensor_ring import TensorRing
from tenfold.layers import FactorizedLayer
from tenfold.planning.eligible import EligibleLayer, costs_of
from tenfold.planning.rows import rows_of
from tenfold.records import Call, Cost, LayerSpec, SharedSliceSpec, chain_macs, chain_params
from tenfold.testing.weights import random_factors

F64 = torch.float64
CONV = LayerSpec(kind="conv", in_channels=12, out_channels=16, kernel=(3, 5), stride=(2, 1), padding=(1, 2), bias=True)
LINEAR = LayerSpec(kind="linear", in_channels=60, out_channels=48, bias=True)


def test_three_convolutions_of_which_the_middle_one_serves_all_slices():
    rank = {"r1": 3, "r2": 4, "r3": 5}
    first, middle, last = TensorRing.structure(CONV, rank)
    assert isinstance(middle, SharedSliceSpec)
    assert (first.weight_shape, last.weight_shape) == ((15, 12, 1, 1), (16, 12, 1, 1))
    assert (middle.copies, middle.weight_shape, middle.layer.stride) == (3, (4, 5, 3, 5), (2, 1))
    assert [s.bias for s in (first, middle, last)] == [False, False, True]
    assert TensorRing.num_params(CONV, rank) == 16 * 3 * 4 + 15 * 4 * 5 + 12 * 5 * 3 + 16
    pixels, out = 9 * 8, 5 * 8
    wanted = pixels * 12 * 15 + out * (3 * 15 * 4 * 5 + 16 * 12)
    assert TensorRing.macs(CONV, rank, (1, 12, 9, 8)) == wanted


def test_four_products_of_a_linear_layer():
    rank = {"r1": 3, "r2": 2, "r3": 4}
    (p, q), (i1, i2) = TensorRing.channel_modes(LINEAR)
    assert (p, q, i1, i2) == (6, 8, 6, 10)
    assert TensorRing.num_params(LINEAR, rank) == 2 * (3 * q + 4 * p + 4 * i1 + 3 * i2) + 48
    steps = (60 * 2 * 3, 4 * (i1 * 2) * 3, p * 2 * 4 * 3, p * q * 2 * 3)
    assert TensorRing.macs(LINEAR, rank, (7, 60)) == 7 * sum(steps)
    assert torch.linalg.matrix_rank(random_factors(TensorRing, LINEAR, rank).to_dense()) == 3 * 4


def test_the_dense_meaning_is_the_trace_of_the_slices():
    value = random_factors(TensorRing, CONV, {"r1": 3, "r2": 4, "r3": 5})
    wanted = torch.einsum("aob,bkc,cia->oik", *(core[0] for core in value.cores)).reshape(CONV.weight_shape)
    torch.testing.assert_close(value.to_dense(), wanted)
    value = random_factors(TensorRing, LINEAR, {"r1": 3, "r2": 2, "r3": 4})
    wanted = torch.einsum("aqb,bpc,cid,dja->pqij", *(core[0] for core in value.cores)).reshape(48, 60)
    torch.testing.assert_close(value.to_dense(), wanted)


def test_a_ring_is_a_sum_of_blocks_that_share_their_core():
    value = random_factors(TensorRing, CONV, {"r1": 3, "r2": 4, "r3": 5})
    outer, middle, inner = (core[0] for core in value.cores)
    core = middle.transpose(1, 2).reshape(1, 1, 4, 5, 3, 5).expand(1, 3, -1, -1, -1, -1)
    blocks = FORMATS.get("block_term")(CONV, core, outer[None], inner.permute(2, 1, 0)[None])
    assert blocks.rank == {"blocks": 3, "out": 4, "in": 5}
    torch.testing.assert_close(blocks.to_dense(), value.to_dense())
    x = torch.randn(2, 12, 9, 8, dtype=F64)
    bias = torch.randn(16, dtype=F64)
    wanted = functional.conv2d(x, value.to_dense(), bias, stride=CONV.stride, padding=CONV.padding)
    torch.testing.assert_close(FactorizedLayer.of(value, bias)(x), wanted)


def test_closed_by_a_bond_of_one_it_is_tucker2():
    ring = TensorRing.structure(CONV, {"r1": 1, "r2": 8, "r3": 6})
    assert ring == FORMATS.get("tucker2").structure(CONV, {"out": 8, "in": 6})


@pytest.mark.parametrize("spec", [CONV, LINEAR])
def test_full_rank_is_the_dense_layer(spec):
    most = TensorRing.max_rank(spec)
    assert TensorRing.structure(spec, most) == (spec,)
    for closing in (1, 2, most["r1"]):
        assert TensorRing.check_rank(spec, most | {"r1": closing}) == most
    assert TensorRing.check_rank(spec, {"r1": 2, "r2": 1, "r3": 1}) == {"r1": 2, "r2": 1, "r3": 1}


def test_what_a_bond_cannot_carry_is_lowered():
    narrow = LayerSpec(kind="conv", in_channels=2, out_channels=64, kernel=(3,))
    assert TensorRing.max_rank(narrow) == {"r1": 2, "r2": 6, "r3": 2}
    assert TensorRing.check_rank(narrow, {"r1": 1, "r2": 6, "r3": 1}) == {"r1": 1, "r2": 3, "r3": 1}


def test_the_order_of_the_convolutions_is_the_cheapest():
    """The kernel could meet the inputs before they are made few, or after the outputs are made many."""
    spec = LayerSpec(kind="conv", in_channels=16, out_channels=24, kernel=(3, 3), padding=(1, 1))
    for r1, r2, r3 in product((1, 2, 3, 8), (1, 4, 12), (1, 3, 8)):
        own = chain_macs(TensorRing.structure(spec, {"r1": r1, "r2": r2, "r3": r3}), (1, 16, 1, 1))
        first = 16 * 9 * r2 * r3 + 16 * r3 * r1 * r2 + 24 * r1 * r2
        last = 16 * r1 * r3 + 24 * r1 * r2 * r3 + 24 * 9 * r2 * r3
        assert own <= min(first, last)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (CONV.replace(groups=2), "without groups"),
        (CONV.replace(kind="conv_transpose"), "not transposed"),
        (CONV.replace(in_channels=1), "channels on both sides"),
        (LayerSpec(kind="conv", in_channels=8, out_channels=8, kernel=(1, 1), stride=(2, 2)), "without stride"),
        (LayerSpec(kind="linear", in_channels=7, out_channels=8), "prime numbers cannot be split"),
        (LayerSpec(kind="embedding", in_channels=8, out_channels=8), "linear layers and convolutions"),
    ],
)
def test_layers_that_no_ring_serves_are_refused_with_the_reason(spec, reason):
    assert reason in TensorRing.unsupported_reason(spec)


@pytest.mark.parametrize("spec", [LayerSpec(kind="conv", in_channels=64, out_channels=48, kernel=(3, 3)), LINEAR])
@pytest.mark.parametrize("format", ["tensor_ring", "block_term"])
def test_grids_have_several_rings_with_exact_costs(format, spec):
    kind = FORMATS.get(format)
    if kind.unsupported_reason(spec) is not None:
        return
    shape = (1, spec.in_channels, 8, 8) if spec.axes else (1, spec.in_channels)
    call = Call(in_shape=shape, out_shape=spec.out_shape(shape), count=1)
    cost = Cost(params=spec.num_params, macs=spec.macs(shape))
    layer = EligibleLayer("layer", spec, (format,), (call,), cost, lambda: torch.zeros(spec.group_shape))
    grid, _ = rows_of(layer, format, layer.load_weight(), rule_from("global"))
    assert len(grid) >= 4
    assert len(set(grid[:, 0].tolist())) >= 2
    for row, params, macs in zip(grid.tolist(), *costs_of(layer, format, grid), strict=True):
        structure = kind.structure(spec, dict(zip(kind.rank_names, row, strict=True)))
        assert (params, macs) == (chain_params(structure), chain_macs(structure, shape))
