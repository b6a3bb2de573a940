"""Curves of the output error against the decompositions that they stand for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tenfold.decompositions import CurveProblem, Decomposition, Moments, decompose, default_algorithm, error_curve
from tenfold.decompositions.curves import interpolated
from tenfold.formats import FORMATS
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


@pytest.mark.parametrize("seeing", [False, True])
@pytest.mark.parametrize("format", ["low_rank", "spatial", "tucker2"])
def test_an_algorithm_without_a_curve_of_its_own_is_fitted_rank_by_rank(format, seeing):
    kind = FORMATS.get(format)
    weight, metric = torch.randn(2, 8, 6, 3, 3, dtype=torch.float64), moments(minded=False) if seeing else None
    algorithm, problem = default_algorithm(format, data_aware=True), CurveProblem(weight, SPEC, kind, metric)
    family = kind.rank_family(SPEC)
    ranks = np.array([list(family[at].values()) for at in (0, len(family) // 2, -1)])
    fitted = Decomposition.error_curve(algorithm, problem)(ranks)
    assert fitted == pytest.approx(algorithm.error_curve(problem)(ranks), rel=0.1, abs=1e-3 * fitted[0])


def test_curves_ask_for_a_dozen_ranks_and_lie_between():
    asked = []

    def at(rank):
        asked.append(rank)
        return np.array([2.0**-rank, 3.0**-rank])

    ranks = np.array([5, 40, 1, 17, 5, *range(1, 41)])
    found = interpolated(at, ranks)
    assert len(asked) == 12
    assert found[:, 0] == pytest.approx(2.0**-ranks, rel=1e-6)
    assert found[:, 1] == pytest.approx(3.0**-ranks, rel=1e-6, abs=1e-12)
    assert interpolated(at, np.array([3])).shape == (1, 2)
