"""Curves of the output error against the decompositions that they stand for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tenfold.decompositions import Moments, decompose
from tenfold.decompositions.curves import damage_curve
from tenfold.formats import FORMATS
from tenfold.records import LayerSpec

SPEC = LayerSpec(kind="conv", in_channels=12, out_channels=16, kernel=(3, 3), groups=2)


def moments(minded: bool) -> Moments:
    x = (
        torch.randn(2, 300, 54, dtype=torch.float64) @ torch.diag(torch.logspace(0, -1.5, 54, dtype=torch.float64))
        + 0.2
    )
    root = torch.randn(2, 8, 8, dtype=torch.float64) * torch.logspace(0, -2, 8, dtype=torch.float64)
    return Moments.of(x).replace(output=root @ root.mT if minded else None)


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
    curve = damage_curve(weight, SPEC, kind, metric)(np.array(ranks))
    for rank, predicted in zip(ranks, curve, strict=True):
        named = dict(zip(kind.rank_names, rank, strict=True))
        fit = decompose(weight.reshape(16, 6, 3, 3), format, named, spec=SPEC, metric=metric)
        reached = metric.damage(weight.flatten(2), fit.value.to_grouped().flatten(2))
        zero = metric.damage(weight.flatten(2), torch.zeros(2, 8, 54, dtype=torch.float64))
        assert predicted == pytest.approx(
            reached, rel=0.15 if "spatial" in format or "tucker" in format else 1e-2, abs=0.01 * zero
        )


def test_formats_without_a_curve_are_refused():
    with pytest.raises(TypeError, match="no curve"):
        damage_curve(torch.randn(2, 8, 6, 3, 3), SPEC, object, moments(minded=False))
