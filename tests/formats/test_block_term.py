"""Sums of Tucker-2 blocks as layers: the grouped convolution of ResNeXt, Tucker-2 and CP as special cases."""

from __future__ import annotations

import torch
from torch import nn

from tenfold.decompositions import decompose, recompress
from tenfold.formats import FORMATS
from tenfold.formats.block_term import BlockTerm
from tenfold.layers import FactorizedLayer
from tenfold.records import LayerSpec
from tenfold.testing.weights import random_factors

F64 = torch.float64
SPEC = LayerSpec(kind="conv", in_channels=24, out_channels=20, kernel=(3, 3), stride=(2, 1), padding=(1, 1), bias=True)


def test_it_is_a_unit_of_resnext():
    """Xie et al. 2017, figure 3c, without nonlinearities: 1×1, a grouped 3×3, 1×1, with the very same weights."""
    blocks, width = 4, 3
    unit = nn.Sequential(
        nn.Conv2d(24, blocks * width, 1, bias=False),
        nn.Conv2d(blocks * width, blocks * width, 3, stride=(2, 1), padding=1, groups=blocks, bias=False),
        nn.Conv2d(blocks * width, 20, 1),
    ).double()
    rank = {"blocks": blocks, "out": width, "in": width}
    value = BlockTerm.from_stages(SPEC, rank, [layer.weight.detach() for layer in unit])
    layer = FactorizedLayer.of(value, unit[2].bias.detach())
    assert [str(stage) for stage in layer.stages] == [str(stage) for stage in unit]
    x = torch.randn(2, 24, 9, 8, dtype=F64)
    torch.testing.assert_close(layer(x), unit(x), rtol=0, atol=0)
    # figure 3a: one branch for each block, summed
    first, middle, last = (conv.weight.detach() for conv in unit)
    summed = unit[2].bias.detach()[None, :, None, None] * torch.ones(2, 20, 5, 8, dtype=F64)
    for c in range(blocks):
        own = slice(c * width, (c + 1) * width)
        narrow = nn.functional.conv2d(nn.functional.conv2d(x, first[own]), middle[own], stride=(2, 1), padding=1)
        summed = summed + nn.functional.conv2d(narrow, last[:, own])
    torch.testing.assert_close(layer(x), summed)


def test_the_dense_meaning_is_the_sum_of_the_blocks_and_costs_are_closed_forms():
    rank = {"blocks": 3, "out": 4, "in": 5}
    value = random_factors(BlockTerm, SPEC, rank)
    wanted = sum(
        torch.einsum("oa,abxy,ib->oixy", value.out_factor[0, c], value.core[0, c], value.in_factor[0, c])
        for c in range(3)
    )
    torch.testing.assert_close(value.to_dense(), wanted)
    assert BlockTerm.num_params(SPEC, rank) == 3 * (24 * 5 + 5 * 4 * 9 + 20 * 4) + 20
    pixels, out = 9 * 8, 5 * 8
    assert BlockTerm.macs(SPEC, rank, (1, 24, 9, 8)) == pixels * 24 * 15 + out * (3 * 5 * 4 * 9 + 20 * 12)


def test_one_block_is_tucker2_and_blocks_of_one_channel_are_cp():
    tucker2, cp3 = FORMATS.get("tucker2"), FORMATS.get("cp3")
    assert BlockTerm.structure(SPEC, {"blocks": 1, "out": 6, "in": 7}) == tucker2.structure(SPEC, {"out": 6, "in": 7})
    assert BlockTerm.structure(SPEC, {"blocks": 9, "out": 1, "in": 1}) == cp3.structure(SPEC, {"rank": 9})


def test_groups_have_blocks_of_their_own():
    spec = SPEC.replace(groups=4)
    rank = {"blocks": 2, "out": 2, "in": 3}
    stages = BlockTerm.structure(spec, rank)
    assert [s.groups for s in stages] == [4, 8, 4]
    value = random_factors(BlockTerm, spec, rank)
    alone = [
        torch.einsum("coa,cabxy,cib->oixy", value.out_factor[g], value.core[g], value.in_factor[g]) for g in range(4)
    ]
    torch.testing.assert_close(value.to_dense(), torch.cat(alone))


def test_full_channels_are_the_dense_layer_whatever_the_number_of_blocks():
    most = BlockTerm.max_rank(SPEC)
    assert most == {"blocks": 20, "out": 20, "in": 24}
    assert BlockTerm.check_rank(SPEC, {"blocks": 2}) == most
    assert BlockTerm.structure(SPEC, most) == (SPEC,)


def test_layers_that_blocks_do_not_serve_are_refused_with_the_reason():
    assert "one product of two" in BlockTerm.unsupported_reason(LayerSpec(kind="linear", in_channels=8, out_channels=8))
    assert "one channel" in BlockTerm.unsupported_reason(SPEC.replace(in_channels=1))


def test_factors_are_recompressed_within_their_frames():
    value = random_factors(BlockTerm, SPEC, {"blocks": 2, "out": 4, "in": 5})
    small = value.reduced()
    assert small.weight.shape == (8, 10, 3, 3)
    torch.testing.assert_close(small.weight.norm(), value.to_dense().norm())
    lifted = small.lift(decompose(small.weight, small.format, {"blocks": 2, "out": 4, "in": 5}).value)
    torch.testing.assert_close(lifted.to_dense(), value.to_dense(), rtol=0, atol=2e-5)
    less = {"blocks": 2, "out": 2, "in": 3}
    again, direct = recompress(value, "block_term", less), decompose(value.to_dense(), "block_term", less)
    assert again.rel_error <= 1.02 * direct.rel_error
