"""CP formats: what they cost, what they stand for, whom they refuse."""

from __future__ import annotations

import pytest
import tensorly
import torch
from tensorly.cp_tensor import cp_to_tensor

from tenfold.decompositions import decompose
from tenfold.formats import FORMATS
from tenfold.layers import FactorizedLayer
from tenfold.records import LayerSpec
from tenfold.testing.weights import random_factors

CONV = LayerSpec(kind="conv", in_channels=12, out_channels=16, kernel=(3, 5), stride=(2, 1), padding=(1, 2), bias=True)


def spec(**changes: object) -> LayerSpec:
    return CONV.replace(**changes)


@pytest.mark.parametrize(("name", "along"), [("cp3", 15), ("cp4", 8)])
def test_parameters_are_those_of_the_papers(name: str, along: int) -> None:
    assert FORMATS.get(name).num_params(CONV, {"rank": 7}) == 7 * (12 + along + 16) + 16


def test_the_spatial_stages_carry_stride_and_padding_and_the_last_the_bias() -> None:
    stages = FORMATS.get("cp4").structure(CONV, {"rank": 7})
    assert [s.kernel for s in stages] == [(1, 1), (3, 1), (1, 5), (1, 1)]
    assert [s.stride for s in stages] == [(1, 1), (2, 1), (1, 1), (1, 1)]
    assert [s.padding for s in stages] == [(0, 0), (1, 0), (0, 2), (0, 0)]
    assert [s.groups for s in stages] == [1, 7, 7, 1]
    assert [s.bias for s in stages] == [False, False, False, True]


def test_an_axis_without_extent_has_no_stage_and_keeps_its_stride() -> None:
    flat = LayerSpec(kind="conv", in_channels=4, out_channels=6, kernel=(2, 3, 1), stride=(1, 1, 2), padding=(0, 0, 1))
    stages = FORMATS.get("cp4").structure(flat, {"rank": 3})
    assert [s.kernel for s in stages] == [(1, 1, 1), (2, 1, 1), (1, 3, 1), (1, 1, 1)]
    assert [s.stride for s in stages] == [(1, 1, 1), (1, 1, 1), (1, 1, 2), (1, 1, 1)]


@pytest.mark.parametrize("name", ["cp3", "cp4"])
def test_the_dense_weight_is_that_of_tensorly(name: str) -> None:
    value = random_factors(FORMATS.get(name), CONV, {"rank": 7})
    with tensorly.backend_context("pytorch"):
        wanted = cp_to_tensor((None, [f[0] for f in value.factors()])).reshape(CONV.weight_shape)
    torch.testing.assert_close(value.to_dense(), wanted)


@pytest.mark.parametrize("name", ["cp3", "cp4"])
@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (LayerSpec(kind="linear", in_channels=4, out_channels=4), "low_rank serves"),
        (spec(kernel=(1, 1), padding=(0, 0)), "low_rank serves"),
        (spec(in_channels=12, out_channels=12, groups=12), "depthwise"),
    ],
)
def test_layers_without_kernel_or_channels_are_refused(name: str, layer: LayerSpec, reason: str) -> None:
    assert reason in (FORMATS.get(name).unsupported_reason(layer) or "")


def test_cp4_refuses_kernels_along_one_axis() -> None:
    assert "cp3 serves" in (FORMATS.get("cp4").unsupported_reason(spec(kernel=(1, 5), padding=(0, 2))) or "")
    assert FORMATS.get("cp3").unsupported_reason(spec(kernel=(1, 5), padding=(0, 2))) is None


def test_full_rank_is_the_least_product_of_all_modes_but_one_and_the_family_stops_where_the_layer_grows() -> None:
    wide = LayerSpec(kind="conv", in_channels=512, out_channels=512, kernel=(3, 3))
    cp3 = FORMATS.get("cp3")
    assert cp3.max_rank(wide) == {"rank": 512 * 9}
    *useful, full = cp3.rank_family(wide)
    assert full == {"rank": 4608}
    assert len(useful) <= 520
    assert cp3.num_params(wide, useful[-1]) <= wide.num_params < cp3.num_params(wide, {"rank": useful[-1]["rank"] + 10})


def test_components_leave_with_columns_of_equal_size() -> None:
    weight = torch.randn(16, 12, 3, 5, generator=torch.Generator().manual_seed(0))
    value = decompose(weight, "cp3", {"rank": 9}).value
    norms = [f.norm(dim=1) / f.shape[1] ** 0.5 for f in value.factors()]
    for other in norms[1:]:
        torch.testing.assert_close(other, norms[0], rtol=1e-4, atol=1e-6)


def test_grouped_layers_run_as_the_dense_one() -> None:
    grouped = LayerSpec(kind="conv", in_channels=8, out_channels=12, kernel=(3, 3), groups=2, padding=(1, 1))
    value = random_factors(FORMATS.get("cp4"), grouped, {"rank": 5})
    x = torch.randn(2, 8, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = torch.nn.functional.conv2d(x, value.to_dense(), padding=1, groups=2)
    torch.testing.assert_close(FactorizedLayer.of(value)(x), wanted)
