"""Inputs that hardly vary make covariances of rounding errors: every algorithm gives a finite result all the same."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tenfold.decompositions import decompose, error_curve
from tenfold.decompositions.input_moments import Moments
from tenfold.decompositions.roots import preconditioner
from tenfold.formats import FORMATS
from tenfold.records import LayerSpec

MAPS = {
    "low_rank": {"rank": 3},
    "tucker2": {"out": 4, "in": 3},
    "spatial": {"rank": 4},
    "cp3": {"rank": 4},
    "tt_conv": None,
    "block_term": None,
}


def rounded(x):
    """Return moments as they are collected: products in the dtype of the rows, sums in float64."""
    return Moments((x.t() @ x).double()[None] / len(x), x.sum(0).double()[None] / len(x), len(x))


def inputs(kind, width):
    x = torch.randn(200, width)
    return {
        "constant": x[:1].expand_as(x),
        "zeros": torch.zeros_like(x),
        "two patterns": x[torch.arange(200) % 2],
        "a small change of large numbers": 1e3 + 1e-4 * x,
        "equal channels": x[:, :1].expand_as(x),
        "huge": 1e20 * x.double(),
        "tiny": 1e-25 * x.double(),
    }[kind]


KINDS = ("constant", "zeros", "two patterns", "a small change of large numbers", "equal channels", "huge", "tiny")


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", MAPS)
def test_fits_and_curves_are_finite(format, kind):
    kernel = (1, 1) if format == "low_rank" else (3, 3)
    spec = LayerSpec(kind="conv", in_channels=6, out_channels=8, kernel=kernel)
    weight = torch.randn(spec.weight_shape)
    moments = rounded(inputs(kind, 6 * math.prod(kernel)))
    found = FORMATS.get(format)
    family = list(found.rank_family(spec))
    rank = MAPS[format] or family[len(family) // 2]
    fit = decompose(weight, format, rank, spec=spec, moments=moments)
    assert all(torch.isfinite(t).all() for t in fit.value.tensors().values())
    assert math.isfinite(fit.rel_error)
    assert fit.output_error is not None
    assert fit.output_error >= 0
    asked = [[r[name] for name in found.rank_names] for r in family[:: max(1, len(family) // 4)]]
    errors = error_curve(weight[None], spec, found, moments)(np.array(asked))
    assert np.isfinite(errors).all()
    assert (errors >= 0).all()


def test_preconditioner_is_cholesky_unless_there_is_none():
    sound = torch.eye(3).double() * 2 + 1
    torch.testing.assert_close(preconditioner(sound, 0.0), torch.linalg.cholesky(sound))
    bad = torch.tensor([[1.0, 2.0], [2.0, 1.0]]).double()
    both = preconditioner(torch.stack([bad, torch.eye(2).double(), torch.zeros(2, 2).double()]), 0.0)
    torch.testing.assert_close(both[:2], torch.eye(2).double().expand(2, 2, 2))
    assert torch.isfinite(torch.cholesky_solve(torch.ones(3, 2, 1).double(), both)).all()
