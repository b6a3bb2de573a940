"""Curves of the output error against the decompositions that they stand for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tenfold.decompositions import Moments, decompose
from tenfold.decompositions.curves import _FittedCurve, between, error_curve
from tenfold.formats import FORMATS
from tenfold.formats.low_rank import LowRank
from tenfold.records import LayerSpec

SPEC = LayerSpec(kind="conv", in_channels=12, out_channels=16, kernel=(3, 3), groups=2)


def moments(minded: bool) -> Moments:
    x = (
        torch.randn(2, 300, 54, dtype=torch.float64) @ torch.diag(torch.logspace(0, -1.5, 54, dtype=torch.float64))
        + 0.2
    )
    root = torch.randn(2, 8, 8, dtype=torch.float64) * torch.logspace(0, -2, 8, dtype=torch.float64)
    return Moments.of(x).replace(output_gram=root @ root.mT if minded else None)


@pytest.mark.parametrize("minded", [False, True])
@pytest.mark.parametrize(
    ("format", "ranks"),
    [
        ("low_rank", [(1,), (4,), (8,)]),
        ("spatial", [(2,), (9,), (18,)]),
        ("tucker2", [(2, 2), (4, 3), (8, 3), (3, 6), (8, 6)]),
    ],
)
def test_the_curve_is_the_damage_of_the_fits(format, ranks, minded):
    weight, metric = torch.randn(2, 8, 6, 3, 3, dtype=torch.float64), moments(minded)
    kind = FORMATS.get(format)
    curve = error_curve(weight, SPEC, kind, metric)(np.array(ranks))
    for rank, predicted in zip(ranks, curve, strict=True):
        named = dict(zip(kind.rank_names, rank, strict=True))
        fit = decompose(weight.reshape(16, 6, 3, 3), format, named, spec=SPEC, moments=metric)
        reached = metric.distortion(weight.flatten(2), fit.value.to_grouped().flatten(2))
        zero = metric.distortion(weight.flatten(2), torch.zeros(2, 8, 54, dtype=torch.float64))
        assert predicted == pytest.approx(
            reached, rel=0.15 if "spatial" in format or "tucker" in format else 1e-2, abs=0.01 * zero
        )


class Mirrored(LowRank):
    """A format that no curve knows: it is fitted rank by rank."""


def test_any_other_format_is_fitted_with_its_own_algorithm():
    weight, metric = torch.randn(2, 8, 6, 3, 3, dtype=torch.float64), moments(minded=False)
    generic = _FittedCurve(weight, SPEC, FORMATS.get("low_rank"), metric)
    ranks = np.array([[1], [4], [8]])
    assert generic(ranks) == pytest.approx(error_curve(weight, SPEC, FORMATS.get("low_rank"), metric)(ranks), rel=0.01)
    assert isinstance(error_curve(weight, SPEC, Mirrored, metric), _FittedCurve)


def test_curves_ask_for_a_dozen_ranks_and_lie_between():
    asked = []

    def at(rank):
        asked.append(rank)
        return np.array([2.0**-rank, 3.0**-rank])

    ranks = np.array([5, 40, 1, 17, 5, *range(1, 41)])
    found = between(at, ranks)
    assert len(asked) == 12
    assert found[:, 0] == pytest.approx(2.0**-ranks, rel=1e-6)
    assert found[:, 1] == pytest.approx(3.0**-ranks, rel=1e-6, abs=1e-12)
    assert between(at, np.array([3])).shape == (1, 2)
