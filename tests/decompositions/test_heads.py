"""Fits that act within heads, against NumPy: closed forms where heads do not correlate, least squares where they do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tenfold.decompositions import CurveProblem, Moments, decompose, spec_of_weight
from tenfold.decompositions.heads import HeadInputs, HeadOutputs
from tenfold.errors import RankError
from tenfold.formats import FORMATS

HEADS, SIZE, OTHER = 4, 6, 20
WIDTH = HEADS * SIZE


def spd(width: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((width, width)) * np.geomspace(1, 0.1, width)
    return mix @ mix.T / width


def root(square: np.ndarray) -> np.ndarray:
    return np.linalg.cholesky(square).T  # SᵀS is the matrix


def moments(square: np.ndarray, gram: np.ndarray | None = None) -> Moments:
    own = Moments(torch.from_numpy(square)[None], torch.zeros(1, len(square), dtype=torch.float64), 10_000)
    return own if gram is None else own.replace(output_gram=torch.from_numpy(gram)[None])


def blocks_of(square: np.ndarray) -> np.ndarray:
    keep = np.kron(np.eye(HEADS), np.ones((SIZE, SIZE)))
    return square * keep


def weighed(weight: np.ndarray, fit, square: np.ndarray, gram: np.ndarray) -> float:
    off = weight - fit.value.to_dense().numpy()
    return float(np.trace(gram @ off @ square @ off.T))


@pytest.fixture
def weight() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((OTHER, WIDTH))


@pytest.mark.parametrize("size", [1, 3, 5])
def test_inputs_of_heads_that_do_not_correlate_meet_the_tails_of_each_head(weight, size):
    square, gram = blocks_of(spd(WIDTH, 1)), np.eye(OTHER)
    fit = decompose(torch.from_numpy(weight), "low_rank", {"rank": HEADS * size},
                    HeadInputs(heads=HEADS, ridge=1e-9), moments=moments(square))  # fmt: skip
    tails = 0.0
    for h in range(HEADS):
        own = slice(h * SIZE, (h + 1) * SIZE)
        values = np.linalg.svd(weight[:, own] @ root(square[own, own]).T, compute_uv=False)
        tails += float((values[size:] ** 2).sum())
    assert weighed(weight, fit, square, gram) == pytest.approx(tails, rel=1e-5)


def test_heads_that_share_their_block_meet_the_tails_of_their_stack(weight):
    square = np.kron(np.eye(HEADS), spd(SIZE, 2))
    algorithm = HeadInputs(heads=HEADS, shared=2, ridge=1e-9)
    fit = decompose(torch.from_numpy(weight), "low_rank", {"rank": HEADS * 3}, algorithm, moments=moments(square))
    stacks = weight.reshape(OTHER, 2, 2, SIZE).transpose(1, 2, 0, 3).reshape(2, 2 * OTHER, SIZE)
    values = np.linalg.svd(stacks @ root(spd(SIZE, 2)).T, compute_uv=False)
    assert weighed(weight, fit, square, np.eye(OTHER)) == pytest.approx(float((values[:, 3:] ** 2).sum()), rel=1e-5)
    factor = fit.value.right[0].numpy().reshape(HEADS, 3, HEADS, SIZE)
    first, second = factor[0, :, 0], factor[1, :, 1]
    first, second = (b / np.linalg.norm(b, axis=1, keepdims=True) for b in (first, second))
    assert np.allclose(first, second)


def test_the_factor_of_the_inputs_is_block_diagonal_and_the_other_one_least_squares(weight):
    square, gram = spd(WIDTH, 3), spd(OTHER, 4)
    fit = decompose(torch.from_numpy(weight), "low_rank", {"rank": HEADS * 2},
                    HeadInputs(heads=HEADS, ridge=1e-9), moments=moments(square, gram))  # fmt: skip
    right, left = fit.value.right[0].numpy(), fit.value.left[0].numpy()
    apart = np.kron(np.eye(HEADS), np.ones((2, SIZE)))
    assert not right[apart == 0].any()
    wanted = np.linalg.lstsq((right @ root(square).T).T, (weight @ root(square).T).T, rcond=None)[0].T
    assert np.allclose(left, wanted, atol=1e-5)


def test_outputs_are_the_mirror_of_inputs(weight):
    square, gram = spd(OTHER, 5), spd(WIDTH, 6)
    raised = gram + 1e-3 * np.trace(gram) / WIDTH * np.eye(WIDTH)  # as errors of outputs are weighed
    known = moments(square, gram)
    fit = decompose(torch.from_numpy(weight.T.copy()), "low_rank", {"rank": HEADS * 2},
                    HeadOutputs(heads=HEADS, ridge=1e-9), moments=known)  # fmt: skip
    left, right = fit.value.left[0].numpy(), fit.value.right[0].numpy()
    assert not left[np.kron(np.eye(HEADS), np.ones((SIZE, 2))) == 0].any()
    wanted = np.linalg.lstsq(root(raised) @ left, root(raised) @ weight.T, rcond=None)[0]
    assert np.allclose(right, wanted, atol=1e-5)
    mirrored = decompose(torch.from_numpy(weight), "low_rank", {"rank": HEADS * 2},
                         HeadInputs(heads=HEADS, ridge=1e-9), moments=moments(raised, square))  # fmt: skip
    assert weighed(weight.T, fit, square, raised) == pytest.approx(weighed(weight, mirrored, raised, square), rel=1e-3)


@pytest.mark.parametrize("kind", [HeadInputs, HeadOutputs])
@pytest.mark.parametrize("weighs", [False, True])
def test_curves_are_the_errors_of_fits(weight, kind, weighs):
    dense = torch.from_numpy(weight if kind is HeadInputs else weight.T.copy())
    out, inner = dense.shape
    square, gram = spd(inner, 7), spd(out, 8) if weighs else None
    algorithm, known = kind(heads=HEADS, ridge=1e-9), moments(square, gram)
    curve = algorithm.error_curve(CurveProblem(dense[None], spec_of_weight(dense), FORMATS.get("low_rank"), known))
    ranks = np.array([[HEADS * size] for size in range(1, SIZE + 1)])
    fits = [decompose(dense, "low_rank", {"rank": int(r)}, algorithm, moments=known) for r in ranks[:, 0]]
    seen = [known.distortion(dense[None], fit.value.to_grouped()) for fit in fits]
    power = known.distortion(dense[None], torch.zeros_like(dense)[None])
    assert np.allclose(curve(ranks), seen, atol=2e-3 * power)
    assert seen[-1] <= 1e-8 * power
    assert (np.diff(seen) <= 1e-9 * power).all()


def test_sizes_that_do_not_divide_are_refused(weight):
    known = moments(spd(WIDTH, 9))
    for algorithm, rank in ((HeadInputs(heads=5), 5), (HeadInputs(heads=4), 6), (HeadInputs(heads=4, shared=3), 8)):
        with pytest.raises(RankError):
            decompose(torch.from_numpy(weight), "low_rank", {"rank": rank}, algorithm, moments=known)


def test_more_components_than_outputs():
    """Heads of 6 that 4 outputs read keep 5 of their 6 inputs each, more in all than the outputs have."""
    tall = torch.from_numpy(np.random.default_rng(1).standard_normal((8, WIDTH)))
    fit = decompose(tall, "low_rank", {"rank": HEADS * 5}, HeadInputs(heads=HEADS), moments=moments(spd(WIDTH, 3)))
    assert fit.value.left.shape == (1, 8, 20)
    assert fit.rel_error < 0.5
