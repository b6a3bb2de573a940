"""Columns are removed as optimal brain surgeon says, and the rest is the least-squares refit."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from tenfold.decompositions import DECOMPOSITIONS, CurveProblem, Moments, decompose
from tenfold.formats import FORMATS
from tenfold.records import LayerSpec

LINEAR = LayerSpec(kind="linear", in_channels=7, out_channels=4)
CONV = LayerSpec(kind="conv", in_channels=5, out_channels=4, kernel=(1, 3))
SELECTION = DECOMPOSITIONS.get("column_selection")(ridge=1e-9)


def problem(spec: LayerSpec, seed: int = 0) -> tuple[torch.Tensor, Moments]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(spec.weight_shape, generator=generator, dtype=torch.float64)
    width = weight[0].numel()
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    x = torch.randn(300, width, generator=generator, dtype=torch.float64) @ mix + 1.0
    gram = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    return weight, Moments.of(x).replace(output_gram=(gram @ gram.mT)[None])


def refit_error(weight: torch.Tensor, moments: Moments, taps: int, chosen: tuple[int, ...]) -> float:
    """Return tr(G Δ C Δᵀ) of the best refit of the chosen inputs, in NumPy."""
    flat, covariance = weight.flatten(1).numpy(), moments.covariance()[0].numpy()  # type: ignore[union-attr]
    places = [channel * taps + tap for channel in chosen for tap in range(taps)]
    best = np.linalg.lstsq(covariance[np.ix_(places, places)], covariance[places] @ flat.T, rcond=None)[0].T
    delta = flat.copy()
    delta[:, places] -= best
    return float(np.trace(moments.output_gram[0].numpy() @ delta @ covariance @ delta.T))  # type: ignore[index]


def greedy(weight: torch.Tensor, moments: Moments, taps: int, size: int) -> set[int]:
    """Return what stays when the input goes, again and again, without which the refit of the others errs least."""
    left = set(range(weight.shape[1]))
    while len(left) > size:
        errors = {gone: refit_error(weight, moments, taps, tuple(sorted(left - {gone}))) for gone in left}
        left.remove(min(errors, key=errors.get))  # type: ignore[arg-type]
    return left


@pytest.mark.parametrize("spec", [LINEAR, CONV], ids=["linear", "conv"])
def test_the_factors_are_the_refit_of_the_greedy_choice_and_the_curve_says_its_error(spec: LayerSpec) -> None:
    weight, moments = problem(spec)
    taps = weight[0, 0].numel()
    curve = SELECTION.error_curve(CurveProblem(weight[None], spec, FORMATS.get("tucker1"), moments))
    for size in range(1, spec.in_channels):
        fit = decompose(weight, "tucker1", {"rank": size}, SELECTION, spec=spec, moments=moments)
        choice = fit.value.in_factor[0]  # type: ignore[attr-defined]
        chosen = tuple(choice.argmax(1).tolist())
        assert torch.equal(choice, torch.eye(spec.in_channels, dtype=choice.dtype)[list(chosen)])
        error = refit_error(weight, moments, taps, chosen)
        seen = moments.distortion(weight[None].flatten(2), fit.value.to_grouped().flatten(2))
        assert seen == pytest.approx(error, rel=0.02)  # the ridge of output Gram matrices weighs outputs otherwise
        assert curve(np.array([[size]]))[0] == pytest.approx(error, rel=0.02)
        assert set(chosen) == greedy(weight, moments, taps, size)


def test_one_input_less_is_the_optimum() -> None:
    weight, moments = problem(LINEAR, seed=3)
    fit = decompose(weight, "tucker1", {"rank": 6}, SELECTION, moments=moments)
    chosen = tuple(fit.value.in_factor[0].argmax(1).tolist())  # type: ignore[attr-defined]
    every = {s: refit_error(weight, moments, 1, s) for s in combinations(range(7), 6)}
    assert chosen == min(every, key=every.get)  # type: ignore[arg-type]


def test_an_input_that_others_determine_costs_nothing() -> None:
    x = torch.randn(200, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x[:, 4] = 2 * x[:, 0] - x[:, 3]
    weight = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    fit = decompose(weight, "tucker1", {"rank": 5}, SELECTION, moments=Moments.of(x))
    assert fit.output_error == pytest.approx(0.0, abs=1e-4)


def test_removals_in_blocks_are_those_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = LayerSpec(kind="linear", in_channels=40, out_channels=8)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(400, 40, generator=generator, dtype=torch.float64)
    weight = torch.randn(1, 8, 40, generator=generator, dtype=torch.float64)
    asked = CurveProblem(weight, spec, FORMATS.get("tucker1"), Moments.of(x))
    sizes = np.arange(1, 41)[:, None]
    whole = SELECTION.error_curve(asked)(sizes)
    monkeypatch.setattr("tenfold.decompositions.column_selection._BLOCK", 1)
    monkeypatch.setattr("tenfold.decompositions.column_selection._AMONG", 40)
    assert SELECTION.error_curve(asked)(sizes) == pytest.approx(whole, rel=0.2, abs=1e-9)
