"""Tucker-CP: which convolutions it becomes, and that frames go where they save nothing."""

from __future__ import annotations

import pytest
import torch

from tenfold.decompositions import decompose
from tenfold.formats import FORMATS
from tenfold.records import LayerSpec
from tenfold.tensors import kruskal
from tenfold.testing.weights import random_factors

TUCKER_CP = FORMATS.get("tucker_cp")
SPEC = LayerSpec(kind="conv", in_channels=64, out_channels=48, kernel=(3, 3), padding=(1, 1), stride=(2, 1), bias=True)


def test_five_convolutions_with_the_parameters_of_the_paper():
    rank = {"out": 12, "in": 16, "rank": 40}
    stages = TUCKER_CP.structure(SPEC, rank)
    assert [s.weight_shape for s in stages] == [
        (16, 64, 1, 1),
        (40, 16, 1, 1),
        (40, 1, 3, 3),
        (12, 40, 1, 1),
        (48, 12, 1, 1),
    ]
    assert [s.bias for s in stages] == [False] * 4 + [True]
    assert [s.stride for s in stages] == [(1, 1), (1, 1), (2, 1), (1, 1), (1, 1)]
    assert TUCKER_CP.num_params(SPEC, rank) == 64 * 16 + 40 * (16 + 9 + 12) + 48 * 12 + 48


@pytest.mark.parametrize("inner", range(1, 65, 3))
def test_two_adjacent_convolutions_merge_where_one_costs_no_more(inner):
    rank = TUCKER_CP.check_rank(SPEC, {"out": 1, "in": inner, "rank": 20})
    merged = inner * (64 + 20) >= 64 * 20
    assert rank["in"] == (64 if merged else inner)
    assert len(TUCKER_CP.structure(SPEC, rank)) == (4 if merged else 5)
    first = TUCKER_CP.structure(SPEC, rank)[:-3]
    assert sum(s.num_params for s in first) == min(64 * 20, inner * (64 + 20))


def test_the_dense_meaning_is_that_of_the_factors():
    value = random_factors(TUCKER_CP, SPEC, {"out": 12, "in": 16, "rank": 40})
    outer, inner = value.out_frame[0] @ value.out_factor[0], value.in_frame[0] @ value.in_factor[0]
    wanted = torch.einsum("or,ir,kr->oik", outer, inner, value.taps[0]).reshape(SPEC.weight_shape)
    torch.testing.assert_close(value.to_dense(), wanted)


def test_frames_are_orthonormal_and_a_weight_of_this_form_is_found():
    spec = LayerSpec(kind="conv", in_channels=16, out_channels=10, kernel=(3, 3))
    rank = {"out": 3, "in": 3, "rank": 4}  # unique: 3 + 3 + 4 ≥ 2·4 + 2 (Kruskal 1977)
    weight = random_factors(TUCKER_CP, spec, rank).to_dense()
    fit = decompose(weight, "tucker_cp", rank)
    assert fit.rel_error < 1e-6
    frame = fit.value.in_frame[0]
    torch.testing.assert_close(frame.T @ frame, torch.eye(3, dtype=frame.dtype))


def test_it_is_at_best_as_near_as_tucker_of_the_same_channels():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(10, 12, 3, 3, generator=generator, dtype=torch.float64)
    tucker = decompose(weight, "tucker2", {"out": 3, "in": 4}).rel_error
    errors = [decompose(weight, "tucker_cp", {"out": 3, "in": 4, "rank": r}).rel_error for r in (6, 8, 12)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] >= tucker - 1e-9


def test_the_stability_is_that_of_the_framed_kernel():
    value = decompose(torch.randn(10, 12, 3, 3, dtype=torch.float64), "tucker_cp", {"out": 3, "in": 3, "rank": 6}).value
    outer, inner = value.out_frame @ value.out_factor, value.in_frame @ value.in_factor
    whole = kruskal.stability((outer, inner, value.taps))
    assert value.stability().largest_term == pytest.approx(whole.largest_term)
    assert value.stability().condition == pytest.approx(whole.condition)
    assert decompose(value.to_dense(), "tucker2", {"out": 3}).stability is None
