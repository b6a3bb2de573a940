"""CP by alternating least squares, against NumPy, TensorLy and what must hold of any tensor."""

from __future__ import annotations

import numpy as np
import pytest
import tensorly
import torch
from numpy.typing import NDArray
from tensorly.decomposition import parafac
from torch import Tensor

from tenfold.decompositions import Moments, decompose, recompress
from tenfold.decompositions.cp.als import CPALS, fit_cp
from tenfold.decompositions.cp.starts import algebraic_start, random_start
from tenfold.decompositions.cp.sweeps import alternate
from tenfold.decompositions.cp.tucker_compression import TuckerCompression
from tenfold.errors import RankError, WeightError
from tenfold.tensors import kruskal

DOUBLE = torch.float64


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def error(tensor: Tensor, factors: list[Tensor]) -> float:
    return float((tensor - kruskal.to_tensor(factors)).norm() / tensor.norm())


def numpy_als(
    tensor: NDArray[np.float64], factors: list[NDArray[np.float64]], order: list[int], sweeps: int
) -> list[float]:
    """Return the errors of textbook sweeps (Kolda & Bader 2009, figure 3.3), the modes in this order."""
    letters = "abcdef"[: tensor.ndim]
    errors = []
    for _ in range(sweeps):
        for mode in order:
            others = [m for m in range(tensor.ndim) if m != mode]
            operands = ",".join(f"{letters[m]}r" for m in others)
            right = np.einsum(f"{letters},{operands}->{letters[mode]}r", tensor, *(factors[m] for m in others))
            gram = np.prod([factors[m].T @ factors[m] for m in others], axis=0)
            factors[mode] = np.linalg.solve(gram, right.T).T
        dense = np.einsum(",".join(f"{c}r" for c in letters) + f"->{letters}", *factors)
        errors.append(float(np.linalg.norm(tensor - dense) / np.linalg.norm(tensor)))
    return errors


@pytest.mark.parametrize(
    ("sizes", "order"), [((9, 8, 4), [0, 2, 1]), ((4, 9, 8), [1, 0, 2]), ((7, 6, 3, 2), [0, 2, 3, 1])]
)
def test_plain_sweeps_are_those_of_the_textbook(sizes: tuple[int, ...], order: list[int]) -> None:
    x = noise(1, *sizes)
    start = random_start(sizes, 5, count=1, seed=1, like=x)
    swept = alternate(x, start, n_iter=6, tol=0.0, momentum=False)
    wanted = numpy_als(x[0].numpy(), [f[0, 0].numpy().copy() for f in start], order, 6)
    np.testing.assert_allclose(swept.history[:, 0, 0].numpy(), wanted, rtol=1e-8)
    np.testing.assert_allclose(error(x, swept.best()), wanted[-1], rtol=1e-8)


@pytest.mark.parametrize("momentum", [False, True])
def test_the_error_never_rises(momentum: bool) -> None:
    x = noise(3, 12, 10, 9)
    history = alternate(x, random_start(x.shape[1:], 8, count=2, seed=0, like=x), n_iter=60, tol=0.0, momentum=momentum)
    assert (history.history[1:] <= history.history[:-1] * (1 + 1e-12)).all()


def test_momentum_needs_fewer_sweeps() -> None:
    x = noise(1, 24, 24, 9)
    start = random_start(x.shape[1:], 40, count=1, seed=0, like=x)
    plain = alternate(x, start, n_iter=120, tol=0.0, momentum=False)
    ahead = alternate(x, start, n_iter=80, tol=0.0)
    assert ahead.history[-1].item() <= plain.history[-1].item()


def test_the_penalty_keeps_terms_from_cancelling_at_no_larger_error() -> None:
    x = noise(1, 16, 16, 9)
    start = random_start(x.shape[1:], 20, count=1, seed=0, like=x)
    plain, held = (alternate(x, start, n_iter=300, tol=0.0, ridge=r) for r in (0.0, 3e-3))
    assert held.history[-1].item() <= plain.history[-1].item() * 1.005
    assert kruskal.least_sensitivity(held.best()).item() <= kruskal.least_sensitivity(plain.best()).item() / 3


@pytest.mark.parametrize("rank", [6, 40])  # fewer and more terms than rows
def test_single_precision_serves_while_errors_are_large_and_double_where_they_are_small(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[torch.dtype] = []
    factorize = torch.linalg.cholesky_ex

    def counted(gram: Tensor, **options: bool) -> tuple[Tensor, Tensor]:
        used.append(gram.dtype)
        found: tuple[Tensor, Tensor] = factorize(gram, **options)
        return found

    monkeypatch.setattr(torch.linalg, "cholesky_ex", counted)
    factors = [noise(1, n, rank, seed=n) for n in (22, 20, 9)]
    for x, share in ((noise(1, 22, 20, 9), 0.8), (kruskal.to_tensor(factors), 0.0)):
        start = random_start(x.shape[1:], rank, count=1, seed=1, like=x)
        used.clear()
        single = alternate(x.float(), start, n_iter=200, tol=0.0, ridge=3e-3)
        found = used.count(torch.float32) / len(used)
        used.clear()
        double = alternate(x, start, n_iter=200, tol=0.0, ridge=3e-3)
        assert found >= share
        assert torch.float32 not in used
        wanted = error(x, double.best())
        assert error(x, [f.double() for f in single.best()]) == pytest.approx(wanted, rel=0.02, abs=2e-3)
        measured = float((single.squares / x.square().sum()).sqrt())
        assert measured == pytest.approx(error(x, [f.double() for f in single.best()]), rel=1e-3, abs=3e-4)
    used.clear()
    alternate(noise(1, 22, 20, 9).float(), start, n_iter=5, tol=0.0)  # nothing holds plain sweeps
    assert torch.float32 not in used


def test_the_error_is_at_most_that_of_tensorly() -> None:
    x = noise(1, 20, 16, 9, seed=4)
    with tensorly.backend_context("pytorch"):
        theirs = parafac(x[0], 12, n_iter_max=60, init="random", random_state=0, tol=None)
        found = tensorly.cp_to_tensor(theirs)
    ours = fit_cp(x, 12, CPALS(n_iter=60, start="random"))
    assert error(x, list(ours.factors)) <= float((x[0] - found).norm() / x.norm())
    assert ours.rel_errors.item() == pytest.approx(error(x, list(ours.factors)), rel=1e-9)


def test_the_algebraic_start_is_exact_without_noise() -> None:
    for sizes, rank in (((7, 6, 4), 6), ((9, 3, 8), 8), ((8, 7, 3, 3), 7)):
        x = kruskal.to_tensor([noise(2, n, rank, seed=i) for i, n in enumerate(sizes)])
        start = algebraic_start(x, rank, seed=0)
        assert start is not None
        assert error(x, [f[:, 0] for f in start]) < 1e-8


def test_frames_lose_nothing_and_shrink_modes_of_lower_rank() -> None:
    x = kruskal.to_tensor([noise(2, n, 4, seed=i) for i, n in enumerate((40, 12, 3))])
    frames = TuckerCompression.of(x)
    assert frames.core.shape == (2, 4, 4, 3)
    factors = [noise(2, n, 5, seed=i) for i, n in enumerate(frames.core.shape[1:])]
    seen = (x - kruskal.to_tensor(frames.lift(factors))).norm()
    torch.testing.assert_close(seen, (frames.core - kruskal.to_tensor(factors)).norm())


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("rank", [1, 3, 11])
def test_ill_behaved_tensors_come_out_right(rank: int, dtype: torch.dtype) -> None:
    u, v, w = noise(1, 8, 1, seed=1), noise(1, 7, 1, seed=2), noise(1, 5, 1, seed=3)
    simple = kruskal.to_tensor([u, v, w])
    twice = kruskal.to_tensor([u.repeat(1, 1, 2), v.repeat(1, 1, 2), w.repeat(1, 1, 2)])
    for x in (torch.zeros(1, 8, 7, 5), simple, twice, simple * 1e-30, simple * 1e30):
        fit = fit_cp(x.to(dtype), rank)
        scale = float(x.abs().max()) or 1.0
        missed = kruskal.to_tensor([f.double() for f in fit.factors]) / scale - x / scale
        assert float(missed.norm()) <= 1e-5 * float((x / scale).norm())
        assert all(f.dtype == dtype and torch.isfinite(f).all() for f in fit.factors)


def test_what_cannot_be_decomposed_is_refused_in_one_line() -> None:
    x = noise(1, 4, 4, 3)
    broken = x.clone()
    broken[0, 0, 0, 0] = float("nan")
    with pytest.raises(WeightError, match="1 NaN or infinite entries of 48"):
        fit_cp(broken, 2)
    with pytest.raises(WeightError, match="not the shape"):
        fit_cp(noise(1, 4), 2)
    with pytest.raises(RankError, match="below 1"):
        fit_cp(x, 0)


def test_from_full_rank_on_the_fit_is_exact_and_takes_no_sweep() -> None:
    x = noise(2, 6, 5, 3)
    for rank in (15, 20):
        fit = fit_cp(x, rank)
        assert fit.n_iter == 0
        assert error(x, list(fit.factors)) < 1e-12


def test_a_fit_goes_on_from_known_factors() -> None:
    x = noise(1, 30, 30, 20).float()
    first = fit_cp(x, 20, CPALS(n_iter=40))
    same = fit_cp(x, 20, CPALS(n_iter=1), start=first.factors)
    more = fit_cp(x, 22, CPALS(n_iter=1), start=first.factors)
    fresh = fit_cp(x, 22, CPALS(n_iter=1))
    assert same.rel_errors.item() <= first.rel_errors.item() * (1 + 1e-3)
    assert more.rel_errors.item() < fresh.rel_errors.item()


def test_factors_are_compressed_further_in_their_own_frames() -> None:
    weight = noise(40, 36, 3, 3).float()
    first = decompose(weight, "cp3", {"rank": 24}).value
    further = recompress(first, "cp3", {"rank": 12})
    fresh = decompose(first.to_dense(), "cp3", {"rank": 12})
    assert further.rel_error <= fresh.rel_error * 1.02


@pytest.mark.parametrize("format", ["cp3", "cp4"])
def test_the_data_aware_fit_has_the_smaller_output_error(format: str) -> None:
    weight = noise(10, 12, 3, 3)
    inputs = noise(2000, 12, 9, seed=5) @ noise(9, 9, seed=6) * torch.arange(1, 13, dtype=DOUBLE)[None, :, None]
    moments = Moments.of(inputs.flatten(1))
    aware = decompose(weight, format, {"rank": 10}, moments=moments)
    plain = decompose(weight, format, {"rank": 10}, CPALS(), moments=moments)
    assert aware.output_error is not None
    assert plain.output_error is not None
    assert aware.output_error < 0.8 * plain.output_error
    centred = inputs.flatten(1) - inputs.flatten(1).mean(0)
    wanted, seen = (w.flatten(1).double() @ centred.T for w in (weight, aware.value.to_dense()))
    assert aware.output_error == pytest.approx(float((wanted - seen).norm() / wanted.norm()), rel=1e-6)
