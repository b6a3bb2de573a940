"""Weights of very many outputs: the same factors as in coordinates of the outputs, on the side of the inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tenfold.decompositions import Moments, Sketch, covariance, decompose, error_curve
from tenfold.decompositions.roots import Root
from tenfold.formats import FORMATS
from tenfold.records import LayerSpec

F64 = torch.float64
CONV = LayerSpec(kind="conv", in_channels=4, out_channels=60, kernel=(3, 3))
GROUPED = LayerSpec(kind="conv", in_channels=8, out_channels=120, kernel=(3, 3), groups=2)
RANKS = [
    ("low_rank", {"rank": 5}),
    ("low_rank", {"rank": 36}),
    ("spatial", {"rank": 6}),
    ("tucker2", {"out": 12, "in": 2}),
    ("tucker2", {"out": 50, "in": 3}),  # more than the inputs span
    ("tucker2", {"out": 60, "in": 3}),
    ("tucker2", {"out": 12, "in": 4}),
    ("cp3", {"rank": 5}),
]


def seen(spec: LayerSpec, gram: str, *, targets: bool = False) -> tuple[torch.Tensor, Moments]:
    """Return a weight and what data say of it: with a Gram matrix, with a sketch of all of it, or without."""
    groups, out, *rest = spec.group_shape
    n = torch.Size(rest).numel()
    x = torch.randn(groups, 500, n, dtype=F64) @ torch.randn(groups, n, n, dtype=F64) + 0.5
    weight = torch.randn(spec.weight_shape)
    y = x @ weight.double().reshape(groups, out, n).mT + torch.randn(groups, 500, out, dtype=F64)
    g = torch.randn(groups, 80, out, dtype=F64)
    own = {"none": None, "matrix": g.mT @ g / 80, "sketch": Sketch.of(g)}[gram]
    return weight, Moments.of(x, y if targets else None).replace(output_gram=own)


@pytest.mark.parametrize(
    "sketch",
    [
        Sketch(torch.randn(2, 5, 12, dtype=F64), torch.rand(2, 12, dtype=F64) + 0.1, torch.zeros(2, 5, dtype=F64)),
        Sketch(torch.randn(1, 30, 12, dtype=F64), torch.full((1, 12), 1e-6, dtype=F64), torch.zeros(1, 30, dtype=F64)),
        Sketch.diagonal_of(torch.rand(1, 12, dtype=F64) + 0.1),
    ],
    ids=["rows", "many rows", "diagonal"],
)
def test_a_root_of_a_sketch_is_one_and_can_be_undone(sketch: Sketch) -> None:
    root, x = Root.of(sketch), torch.randn(len(sketch.rest), 12, 3, dtype=F64)
    kept = x.clone()
    torch.testing.assert_close((root @ x).mT @ (root @ x), x.mT @ sketch.dense() @ x)
    torch.testing.assert_close(root.solve(root @ x), x)
    torch.testing.assert_close(root @ root.solve(x), x)
    torch.testing.assert_close(root.times_(x.clone()), root @ x)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("spec", [CONV, GROUPED], ids=["conv", "grouped"])
@pytest.mark.parametrize("targets", [False, True], ids=["own outputs", "targets"])
@pytest.mark.parametrize(("format", "rank"), RANKS)
def test_the_side_of_the_inputs_finds_the_same_error(
    spec: LayerSpec, targets: bool, format: str, rank: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for wide, gram in ((1024, "matrix"), (8, "matrix"), (8, "sketch")):
        monkeypatch.setattr(covariance, "WIDE_OUTPUTS", wide)
        torch.manual_seed(0)
        weight, moments = seen(spec, gram, targets=targets)
        fit = decompose(weight, format, rank, spec=spec, moments=moments)
        groups, out = spec.group_shape[:2]
        flat = weight.double().reshape(groups, out, -1)
        lost = moments.distortion(flat, fit.value.to(F64).to_grouped().flatten(2))
        assert fit.value.to_dense().dtype == weight.dtype
        found[wide, gram] = (lost / moments.distortion(flat, torch.zeros_like(flat)), fit.output_error, fit.rel_error)
    plain = found.pop((1024, "matrix"))
    for other in found.values():
        assert other == pytest.approx(plain, rel=2e-2, abs=1e-4)


@pytest.mark.parametrize("format", ["low_rank", "spatial", "tucker2"])
def test_curves_of_tall_weights_end_where_fits_do(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moments = seen(CONV, "sketch")
    monkeypatch.setattr(covariance, "WIDE_OUTPUTS", 8)
    kind = FORMATS.get(format)
    ranks = [rank for name, rank in RANKS if name == format]
    curve = error_curve(weight[None], CONV, kind, moments)(np.array([list(rank.values()) for rank in ranks]))
    flat = weight.double().flatten(1)[None]
    for rank, value in zip(ranks, curve, strict=True):
        fit = decompose(weight, format, rank, spec=CONV, moments=moments).value
        own = moments.distortion(flat, fit.to(F64).to_grouped().flatten(2))
        assert own * (1 - 1e-3) - 1e-3 <= value <= 1.3 * own + 1


def test_distortion_with_a_sketch_is_that_of_its_matrix() -> None:
    weight, moments = seen(GROUPED, "sketch")
    gram = moments.output_gram
    assert isinstance(gram, Sketch)
    flat = weight.double().reshape(2, 60, -1)
    other = flat + torch.randn_like(flat)
    whole = moments.replace(output_gram=gram.dense())
    assert moments.distortion(flat, other) == pytest.approx(whole.distortion(flat, other))
    moments.check(GROUPED.group_shape)
    assert moments.digest() != whole.digest()
    assert moments.to("cpu").output_gram is not None


def test_moments_of_some_outputs_are_those_rows() -> None:
    weight, moments = seen(CONV, "none", targets=True)
    flat, rows = weight.double().flatten(1)[None], slice(7, 20)
    other = flat + 0.1 * torch.randn_like(flat)
    for own in (moments, moments.replace(input_second_moment=Sketch.of(torch.randn(50, 36), torch.randn(50, 60)))):
        part = own.of_outputs(rows)
        for found, wanted in zip(part.errors(flat[:, rows], other[:, rows]), own.errors(flat, other), strict=True):
            torch.testing.assert_close(found, wanted[:, rows])
        torch.testing.assert_close(
            part.regression_target(flat[:, rows], 1e-3), own.regression_target(flat, 1e-3)[:, rows]
        )
