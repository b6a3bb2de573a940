"""Data-aware decompositions against closed forms, the published reference routine and their own bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tenfold.decompositions import Moments, decompose, default_algorithm
from tenfold.decompositions.roots import solve_spd, sqrt_and_inverse_sqrt
from tenfold.decompositions.weighted_als import Weighted, WeightedALS, WhitenedSVD, alternate
from tenfold.errors import WeightError
from tenfold.layers import FactorizedLayer, spec_of

F64 = torch.float64
RANKS = [
    ("low_rank", {"rank": 4}),
    ("spatial", {"rank": 5}),
    ("tucker2", {"out": 4, "in": 3}),
    ("tucker2", {"out": 4}),
    ("tucker2", {"in": 3}),
]


def correlated(rows: int, width: int, *, rank: int | None = None, offset: float = 0.3) -> torch.Tensor:
    spread = torch.logspace(0, -1.5, width, dtype=F64)
    mix = torch.linalg.qr(torch.randn(width, width, dtype=F64)).Q * spread
    x = torch.randn(rows, width, dtype=F64)
    if rank is not None:
        x[:, rank:] = 0
    return x @ mix.T + offset


def loss(weight, value, x):
    """Return the squared output error with the means apart, computed from the rows."""
    centred = x - x.mean(0)
    delta = (weight - value.to_dense()).flatten(1).double()
    return float((centred @ delta.T).square().sum() / len(x))


@pytest.fixture
def case():
    weight = torch.randn(8, 6, 3, 3, dtype=F64)
    x = correlated(400, 54)
    return weight, x, Moments.of(x)


def test_whitened_svd_attains_the_tail_of_the_whitened_spectrum(case):
    weight, x, metric = case
    fit = decompose(weight, "low_rank", {"rank": 3}, WhitenedSVD(ridge=0.0), moments=metric)
    covariance = metric.covariance()[0]
    by_root = torch.linalg.svdvals(weight.flatten(1) @ sqrt_and_inverse_sqrt(covariance)[0])
    by_cholesky = torch.linalg.svdvals(weight.flatten(1) @ torch.linalg.cholesky(covariance))
    reached = loss(weight, fit.value, x)
    assert reached == pytest.approx(float(by_root[3:].square().sum()), rel=1e-6)
    assert reached == pytest.approx(float(by_cholesky[3:].square().sum()), rel=1e-6)
    assert fit.output_error == pytest.approx((reached / float(by_root.square().sum())) ** 0.5, rel=1e-6)


@pytest.mark.parametrize(("format", "rank"), RANKS)
def test_the_data_help_and_no_factorization_beats_the_bound(case, format, rank):
    weight, x, metric = case
    aware = decompose(weight, format, rank, moments=metric)
    plain = decompose(weight, format, rank, default_algorithm(format), moments=metric)
    assert aware.output_error < 0.9 * plain.output_error
    made = (x - x.mean(0)) @ weight.flatten(1).T
    assert aware.output_error**2 * float(made.square().sum() / len(x)) == pytest.approx(
        loss(weight, aware.value, x), rel=1e-6
    )
    if "out" in rank:
        values = torch.linalg.svdvals(weight.flatten(1) @ sqrt_and_inverse_sqrt(metric.covariance()[0])[0])
        assert loss(weight, aware.value, x) > float(values[rank["out"] :].square().sum()) * (1 - 1e-4)


@pytest.mark.parametrize(("format", "rank"), RANKS)
def test_white_data_give_the_plain_decomposition(format, rank):
    weight = torch.randn(8, 6, 3, 3, dtype=F64)
    white = Moments(torch.eye(54, dtype=F64)[None], torch.zeros(1, 54, dtype=F64), 1)
    exact = {} if format == "low_rank" else {"n_iter": 200, "tol": 1e-12}
    algorithm = type(default_algorithm(format, data_aware=True))(**exact)
    plain = {"n_iter": 200, "tol": 1e-12} if format == "tucker2" else {}
    wanted = decompose(weight, format, rank, type(default_algorithm(format))(**plain)).rel_error
    for metric in (white, None):  # both alternate to a local optimum of the same problem, not always the same one
        assert decompose(weight, format, rank, algorithm, moments=metric).rel_error == pytest.approx(wanted, rel=5e-3)


@pytest.mark.parametrize(("r_out", "r_in"), [(4, 3), (8, 3), (2, 5)])
def test_every_sweep_lowers_the_error_and_reaches_that_of_the_reference(case, r_out, r_in):
    weight, _, metric = case
    covariance = metric.covariance(1e-9)
    problem = Weighted.of(weight.flatten(2)[None], covariance)
    solved = alternate(problem, r_out, r_in, WeightedALS(n_iter=60, tol=1e-9))
    assert all(b <= a + 1e-12 for a, b in zip(solved.errors, solved.errors[1:], strict=False))
    w, s = weight.flatten(2).numpy(), covariance[0].numpy()
    u = np.linalg.svd(w.reshape(8, -1))[0][:, :r_out]
    v = np.linalg.svd(w.transpose(1, 0, 2).reshape(6, -1))[0][:, :r_in]
    u, g, v = da_tucker2(w, s, u, v, sweeps=200)
    delta = w - np.einsum("abk,oa,ib->oik", g, u, v)
    reference = np.sum((delta.reshape(8, -1) @ s) * delta.reshape(8, -1)) / float(problem.power)
    assert solved.errors[-1] <= reference * 1.02


def da_tucker2(W, S, U, V, sweeps):
    """Plain alternating least squares with dense normal equations: slow, and simple enough to trust."""
    O, I, K = W.shape  # noqa: E741
    Wm, S4 = W.reshape(O, -1), S.reshape(I, K, I, K)
    G = np.einsum("oik,oa,ib->abk", W, U, V)
    ro, ri = U.shape[1], V.shape[1]
    for _ in range(sweeps):
        B = np.einsum("abk,ib->aik", G, V).reshape(ro, -1)
        U = np.linalg.solve(B @ S @ B.T, (Wm @ S @ B.T).T).T
        P = np.einsum("ib,kl->ikbl", V, np.eye(K)).reshape(I * K, ri * K)
        G = (np.linalg.pinv(U) @ Wm @ S @ P @ np.linalg.inv(P.T @ S @ P)).reshape(ro, ri, K)
        A, R, UU = np.zeros((ri * I, ri * I)), np.zeros((ri, I)), U.T @ U
        for k in range(K):
            for m in range(K):
                block = S4[:, m, :, k]
                A += np.kron(block.T, G[:, :, k].T @ UU @ G[:, :, m])
                R += G[:, :, k].T @ U.T @ W[:, :, m] @ block
        V = np.linalg.solve(A, R.T.reshape(-1)).reshape(I, ri)
    return U, G, V


@pytest.mark.parametrize(("format", "rank"), RANKS)
def test_factors_that_the_data_cannot_tell_apart_cost_nothing(format, rank):
    weight = torch.randn(8, 6, 3, 3, dtype=F64)
    metric = Moments.of(correlated(40, 54, rank=2))  # fewer rows than the width, and rank 2
    fit = decompose(weight, format, {"rank": 5} if "rank" in rank else rank, moments=metric)
    assert all(torch.isfinite(t).all() for t in fit.value.tensors().values())
    assert fit.output_error < (0.02 if format == "low_rank" else 0.2)


@pytest.mark.parametrize(
    ("format", "full"), [("low_rank", {}), ("spatial", {}), ("tucker2", {}), ("tucker2", {"out": 8})]
)
def test_full_rank_is_exact_even_where_there_are_no_data(format, full):
    weight = torch.randn(8, 6, 3, 3, dtype=F64)
    for x in (correlated(100, 54), torch.zeros(5, 54, dtype=F64), torch.ones(5, 54, dtype=F64)):
        fit = decompose(weight, format, full, moments=Moments.of(x))
        assert fit.rel_error < 1e-6
        assert fit.output_error < 1e-6


@pytest.mark.parametrize(("format", "rank"), RANKS)
def test_zero_weights_give_zero_factors(format, rank, case):
    fit = decompose(torch.zeros(8, 6, 3, 3), format, rank, moments=case[2])
    assert fit.rel_error == fit.output_error == 0
    assert all(torch.isfinite(t).all() for t in fit.value.tensors().values())


def test_the_bias_takes_the_mean_and_so_beats_none(case):
    weight, x, metric = case
    fit = decompose(weight, "tucker2", {"out": 4, "in": 3}, moments=metric)
    y = x @ weight.flatten(1).T
    made = x @ fit.value.to_dense().flatten(1).T
    with_bias = (y - made - fit.bias_shift).square().sum() / len(x)
    assert with_bias < (y - made).square().sum() / len(x)
    power = (y - y.mean(0)).square().sum() / len(x)
    assert fit.output_error == pytest.approx(float(with_bias / power) ** 0.5, rel=1e-9)


@pytest.mark.parametrize(("format", "rank"), RANKS)
def test_targets_make_up_for_changed_inputs(format, rank):
    weight, x = torch.randn(8, 6, 3, 3, dtype=F64), correlated(600, 54)
    y = x @ weight.flatten(1).T
    changed = x + 0.2 * torch.randn_like(x) + 0.3 * x.roll(1, 1)
    metric = Moments.of(changed, y)

    def missed(fit):
        made = changed @ fit.value.to_dense().flatten(1).T + fit.bias_shift
        return float((y - made).square().sum() / (y - y.mean(0)).square().sum()) ** 0.5

    symmetric = decompose(weight, format, rank, moments=Moments.of(x))
    own = decompose(weight, format, rank, moments=metric)
    assert own.output_error == pytest.approx(missed(own), rel=1e-6)
    assert missed(own) < missed(symmetric)
    best = torch.linalg.lstsq(changed - changed.mean(0), y - y.mean(0)).solution.T
    free = decompose(weight, "low_rank", {}, moments=metric)
    torch.testing.assert_close(free.value.to_dense().flatten(1), best, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("format", "rank"), RANKS)
def test_errors_count_where_the_network_minds_them(format, rank, case):
    weight, _, metric = case
    minds = torch.linalg.qr(torch.randn(8, 8, dtype=F64)).Q * torch.logspace(0, -3, 8, dtype=F64)
    minds = minds @ minds.T
    aware = metric.replace(output_gram=minds[None])

    def distortion(fit):
        delta = (weight - fit.value.to_dense()).flatten(1)
        return float((delta @ metric.covariance()[0] @ delta.T * minds).sum())

    own, blind = (decompose(weight, format, rank, moments=m) for m in (aware, metric))
    assert distortion(own) < (1.0001 if rank == {"in": 3} else 0.99) * distortion(blind)
    assert aware.distortion(weight.flatten(1)[None], own.value.to_grouped().flatten(2)) == pytest.approx(
        distortion(own), rel=1e-5
    )


@pytest.mark.parametrize(("format", "rank"), RANKS)
def test_groups_are_small_convolutions_of_their_own(format, rank):
    layer = nn.Conv2d(12, 16, 3, groups=2).double()
    spec, _ = spec_of(layer)
    x = torch.stack([correlated(200, 54), correlated(200, 54, offset=1.0)])
    algorithm = WhitenedSVD() if format == "low_rank" else WeightedALS(n_iter=5, tol=-1)
    both = decompose(layer.weight, format, rank, algorithm, spec=spec, moments=Moments.of(x))
    for i in range(2):
        rows = slice(8 * i, 8 * i + 8)
        half = decompose(layer.weight[rows], format, rank, algorithm, moments=Moments.of(x[i]))
        torch.testing.assert_close(both.bias_shift[rows], half.bias_shift)
        torch.testing.assert_close(both.value.to_dense()[rows], half.value.to_dense())
    assert FactorizedLayer.of(both.value, layer.bias)(torch.randn(1, 12, 4, 4, dtype=F64)).shape == (1, 16, 2, 2)


def test_foreign_or_broken_moments_are_refused(case):
    weight, _, metric = case
    with pytest.raises(
        WeightError, match=r"input_second_moment of shape \(1, 54, 54\), this layer needs \(1, 27, 27\)"
    ):
        decompose(weight[:, :3], "low_rank", {"rank": 2}, moments=metric)
    with pytest.raises(WeightError, match="not finite"):
        decompose(weight, "low_rank", {"rank": 2}, moments=metric.replace(mean=metric.mean / 0))


def test_channel_covariance_is_the_mean_over_taps(case):
    _, x, metric = case
    taps = x.reshape(-1, 6, 9) - x.reshape(-1, 6, 9).mean(0)
    wanted = torch.einsum("nct,ndt->cd", taps, taps) / (9 * len(x))
    torch.testing.assert_close(metric.channel_covariance(9)[0], wanted)


def test_singular_systems_are_solved_by_eigenvectors():
    square = torch.diag(torch.tensor([2.0, 1.0, 0.0], dtype=F64))
    torch.testing.assert_close(solve_spd(square, square), torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=F64)))


def test_fits_are_deterministic_and_in_the_dtype_of_the_weight(case):
    weight, _, metric = case
    fits = [decompose(weight.half(), "tucker2", {"out": 4, "in": 3}, moments=metric).value for _ in range(2)]
    for a, b in zip(*(f.tensors().values() for f in fits), strict=True):
        assert a.dtype == torch.float16
        assert torch.equal(a, b)


@pytest.mark.parametrize("taps", [1, 3])
def test_a_weight_of_lower_rank_stays_met_where_only_rounding_is_left(taps):
    weight = torch.full((1, 1, 18, taps), 1.0, dtype=F64)
    problem = Weighted.of(weight, torch.eye(18 * taps, dtype=F64)[None])
    for rank in (1, 2, 3, 5):
        solved = alternate(problem, 1, rank, WeightedALS(n_iter=5, tol=-1))
        assert max(solved.errors) < 1e-14
