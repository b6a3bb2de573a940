"""Closed forms and meanings of the three formats, against formulas of the papers and plain einsums."""

from __future__ import annotations

import pytest
import torch

from tenfold.errors import RankError, WeightError
from tenfold.formats import FORMATS, join_groups, split_groups
from tenfold.formats.low_rank import LowRank
from tenfold.formats.spatial import Spatial
from tenfold.formats.tucker2 import Tucker2
from tenfold.records import LayerSpec
from tenfold.testing.weights import random_factors, random_weight

CONV = LayerSpec(kind="conv", in_channels=32, out_channels=64, kernel=(3, 5), padding=(1, 2), stride=(2, 1), bias=True)
DEEP = LayerSpec(kind="conv", in_channels=6, out_channels=6, kernel=(3, 3), groups=6)


def test_parameters_are_the_papers():
    assert LowRank.num_params(CONV, {"rank": 20}) == 20 * (32 * 15 + 64) + 64
    assert Spatial.num_params(CONV, {"rank": 20}) == 20 * (32 * 3 + 64 * 5) + 64
    assert Tucker2.num_params(CONV, {"out": 24, "in": 16}) == 32 * 16 + 16 * 24 * 15 + 64 * 24 + 64


def test_macs_follow_the_stride_of_each_stage():
    shape = (1, 32, 8, 8)  # outputs 4×8
    assert LowRank.macs(CONV, {"rank": 20}, shape) == 32 * 20 * (32 * 15 + 64)
    assert Spatial.macs(CONV, {"rank": 20}, shape) == 32 * 20 * (32 * 3 + 64 * 5)
    assert Tucker2.macs(CONV, {"out": 24, "in": 16}, shape) == 64 * 32 * 16 + 32 * (16 * 24 * 15 + 64 * 24)


def test_meanings_are_the_einsums_of_the_papers():
    two = random_factors(Tucker2, CONV, {"out": 5, "in": 4})
    wanted = torch.einsum("abxy,oa,ib->oixy", two.core[0], two.out_factor[0], two.in_factor[0])
    torch.testing.assert_close(two.to_dense(), wanted)
    cut = random_factors(Spatial, CONV, {"rank": 7})
    wanted = torch.einsum("ory,rix->oixy", cut.second[0], cut.first[0])
    torch.testing.assert_close(cut.to_dense(), wanted)
    low = random_factors(LowRank, CONV, {"rank": 7})
    torch.testing.assert_close(low.to_dense(), torch.einsum("or,rixy->oixy", low.left[0], low.right[0]))


def test_full_rank_on_one_side_drops_that_factor():
    structure = Tucker2.structure(CONV, {"out": 64, "in": 8})
    assert [s.kernel for s in structure] == [(1, 1), (3, 5)]
    assert [s.bias for s in structure] == [False, True]
    assert [s.kernel for s in Tucker2.structure(CONV, {"out": 8, "in": 32})] == [(3, 5), (1, 1)]
    assert Tucker2.structure(CONV, {"out": 64, "in": 32}) == (CONV,)
    assert random_factors(Tucker2, CONV, {"out": 64, "in": 8}).tensors().keys() == {"core", "in_factor"}


def test_only_the_stage_with_the_kernel_has_stride_and_padding():
    for stage in Tucker2.structure(CONV, {"out": 24, "in": 16})[::2]:
        assert (stage.stride, stage.padding, stage.kernel) == ((1, 1), (0, 0), (1, 1))
    first, second = Spatial.structure(CONV, {"rank": 3})
    assert (first.kernel, first.stride, first.padding) == ((3, 1), (2, 1), (1, 0))
    assert (second.kernel, second.stride, second.padding) == ((1, 5), (1, 1), (0, 2))


@pytest.mark.parametrize(
    ("format", "spec", "reason"),
    [
        (Tucker2, LayerSpec(kind="linear", in_channels=4, out_channels=4), "low_rank serves this layer"),
        (Tucker2, LayerSpec(kind="conv", in_channels=4, out_channels=4, kernel=(1, 1)), "low_rank serves this layer"),
        (Tucker2, DEEP, "depthwise"),
        (LowRank, DEEP, "rank 1 already"),
        (Spatial, LayerSpec(kind="conv", in_channels=4, out_channels=4, kernel=(3,)), "at least two axes"),
        (Spatial, LayerSpec(kind="conv", in_channels=4, out_channels=4, kernel=(1, 3)), "one axis only"),
        (LowRank, LayerSpec(kind="linear", in_channels=9, out_channels=1), "nothing to drop"),
    ],
)
def test_refusals_tell_why(format, spec, reason):
    assert reason in format.unsupported_reason(spec)


def test_impossible_ranks_say_what_is_allowed():
    with pytest.raises(
        RankError, match=r"tucker2 rank out=99 is outside 1\.\.64 for a weight of shape \(64, 32, 3, 5\)"
    ):
        Tucker2.num_params(CONV, {"out": 99, "in": 4})
    with pytest.raises(RankError, match=r"tucker2 has the ranks out, in, not rank"):
        Tucker2.check_rank(CONV, {"rank": 4})
    assert Tucker2.check_rank(CONV, {"in": 4}) == {"out": 64, "in": 4}


def test_the_family_of_tucker2_walks_muscos_line_within_the_clamps():
    spec = LayerSpec(kind="conv", in_channels=512, out_channels=128, kernel=(3, 3))
    family = Tucker2.rank_family(spec)
    assert family[0] == {"out": 1, "in": 1}
    assert {"out": 100, "in": 100} in family
    assert all(r["out"] <= 128 and r["in"] <= 512 for r in family)
    wide = LayerSpec(kind="conv", in_channels=64, out_channels=128, kernel=(3, 3))
    assert {"out": 67, "in": 42} in Tucker2.rank_family(wide)  # β = 1.6


@pytest.mark.parametrize("kind", ["conv", "conv_transpose", "linear", "embedding"])
def test_groups_come_apart_and_together(kind):
    conv = kind.startswith("conv")
    options = {"kernel": (2, 3), "groups": 2} if conv else {}
    spec = LayerSpec(kind=kind, in_channels=6, out_channels=8, **options)
    weight = random_weight(spec)
    apart = split_groups(weight, spec)
    assert apart.shape == spec.group_shape
    assert torch.equal(join_groups(apart, spec), weight)
    with pytest.raises(WeightError, match="the weight has shape"):
        split_groups(weight[:1], spec)


def test_each_group_is_the_kernel_that_torch_applies_to_it():
    spec = LayerSpec(kind="conv_transpose", in_channels=6, out_channels=8, kernel=(3,), groups=2)
    weight = random_weight(spec)
    torch.testing.assert_close(split_groups(weight, spec)[1], weight[3:].transpose(0, 1))


def test_factors_convert_and_scale():
    value = random_factors(LowRank, CONV, {"rank": 4})
    assert value.to(torch.float16).to_dense().dtype == torch.float16
    torch.testing.assert_close(value.scaled(4.0).left, 2 * value.left)
    two = random_factors(Tucker2, CONV, {"out": 4, "in": 4})
    assert torch.equal(two.scaled(4.0).out_factor, two.out_factor)
    assert {type(value).name(), type(two).name()} == {"low_rank", "tucker2"} <= set(FORMATS.names())


def test_a_component_that_is_zero_on_one_side_stays_trainable_when_balanced():
    left, right = torch.rand(1, 5, 3) + 0.1, torch.rand(1, 3, 4) + 0.1
    right[:, 2] = 0
    found = LowRank(LayerSpec(kind="linear", in_channels=4, out_channels=5), left=left, right=right).balanced()
    torch.testing.assert_close(found.left.norm(dim=1)[:, :2], found.right.norm(dim=2)[:, :2])
    assert torch.equal(found.left[..., 2], left[..., 2])
    assert torch.equal(found.right[:, 2], right[:, 2])
