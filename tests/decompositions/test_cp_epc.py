"""Error preserving correction against its closed forms, and stable CP on tensors that degenerate."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import brentq

from tenfold.decompositions import decompose
from tenfold.decompositions.cp.correction import correct, objective_of, update_block
from tenfold.decompositions.cp.epc import CPEPC
from tenfold.decompositions.cp.gauss_newton import _gauss_newton, descend
from tenfold.decompositions.cp.power import CPPower
from tenfold.errors import TenfoldError
from tenfold.formats import FORMATS
from tenfold.tensors import kruskal

F64 = torch.float64
OBJECTIVES = ["sensitivity", "norms"]


def _normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def _factors(shape, rank, batch=1, seed=0):
    return [_normal(batch, n, rank, seed=seed + m) for m, n in enumerate(shape)]


def _collinear(shape, rank, cosine, seed=0):
    """Components with the same cosine between any two columns of a mode."""
    factors = []
    for m, n in enumerate(shape):
        frame = torch.linalg.qr(_normal(n, rank + 1, seed=seed + m)).Q
        factors.append((cosine**0.5 * frame[:, :1] + (1 - cosine) ** 0.5 * frame[:, 1:])[None])
    return factors


def _border_rank_two(seed=0):
    """x∘x∘y + x∘y∘x + y∘x∘x: rank 3, but as near to rank 2 as one likes."""
    frames = [torch.linalg.qr(_normal(n, 2, seed=seed + n)).Q for n in (6, 5, 4)]
    (a, p), (b, q), (c, s) = (frame.unbind(1) for frame in frames)
    terms = ((a, b, s), (a, q, c), (p, b, c))
    return torch.stack([torch.einsum("i,j,k->ijk", *t) for t in terms]).sum(0)[None]


def _squares(tensor, factors):
    return (tensor - kruskal.to_tensor(factors)).flatten(1).square().sum(1)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("shape", [(7, 6, 5), (5, 4, 3, 2), (8, 6)])
def test_a_block_meets_the_bound_exactly_and_is_the_ridge_regression(objective, shape):
    tensor, factors = _normal(2, *shape), _factors(shape, 4, batch=2, seed=5)
    for mode in range(len(shape)):
        least = update_block(tensor, factors, mode, None).least
        bound = 0.5 * (least + tensor.flatten(1).square().sum(1))
        found = list(factors)
        found[mode] = update_block(tensor, factors, mode, bound, objective).factor
        torch.testing.assert_close(_squares(tensor, found), bound, rtol=1e-9, atol=0)
        for i in range(2):
            weights = _weights(factors, mode, objective)[i]
            products, gram = kruskal.mttkrp(tensor, factors, mode)[i], kruskal.gram_product(factors, mode)[i]

            def excess(mu, weights=weights, products=products, gram=gram, mode=mode, i=i, bound=bound):
                trial = [f[i : i + 1] for f in factors]
                trial[mode] = torch.linalg.solve(gram + mu * weights.diag(), products.T).T[None]
                return float(_squares(tensor[i : i + 1], trial) - bound[i])

            mu = brentq(excess, 0.0, 1e9, xtol=1e-14, rtol=1e-14)
            wanted = torch.linalg.solve(gram + mu * weights.diag(), products.T).T
            torch.testing.assert_close(found[mode][i], wanted, rtol=1e-6, atol=1e-8)


def _weights(factors, mode, objective):
    """The objective as a function of one factor, by evaluating it at unit columns (batch, R)."""
    found = []
    for r in range(factors[0].shape[-1]):
        unit = [f[..., r : r + 1] for f in factors]
        empty = list(unit)
        unit[mode] = (
            torch.nn.functional.one_hot(torch.tensor([0]), unit[mode].shape[1]).T.double().expand_as(unit[mode])
        )
        empty[mode] = torch.zeros_like(unit[mode])
        found.append(objective_of(unit, objective) - objective_of(empty, objective))
    return torch.stack(found, -1)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_feasible_block_has_a_lower_objective(objective):
    tensor, factors = _normal(1, 7, 6, 5), _factors((7, 6, 5), 4, seed=5)
    bound = 1.1 * update_block(tensor, factors, 0, None).least
    best = update_block(tensor, factors, 0, bound, objective).factor
    value = objective_of([best, *factors[1:]], objective)
    generator = torch.Generator().manual_seed(3)
    moves = torch.randn(20000, *best.shape[1:], generator=generator, dtype=F64)
    sizes = 10.0 ** torch.empty(20000, 1, 1, dtype=F64).uniform_(-4, 0, generator=generator)
    trials = [best + sizes * moves, *(f.expand(20000, -1, -1) for f in factors[1:])]
    feasible = _squares(tensor, trials) <= bound
    assert 100 < int(feasible.sum()) < 20000
    assert bool((objective_of(trials, objective)[feasible] >= value * (1 - 1e-9)).all())


def test_a_bound_out_of_reach_gives_the_least_squares_factor():
    tensor, factors = _normal(1, 7, 6, 5), _factors((7, 6, 5), 4, seed=5)
    found = update_block(tensor, factors, 1, torch.tensor([1e-3], dtype=F64))
    wanted = torch.linalg.lstsq(kruskal.gram_product(factors, 1), kruskal.mttkrp(tensor, factors, 1).mT).solution.mT
    torch.testing.assert_close(found.factor, wanted, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(found.least, _squares(tensor, [factors[0], wanted, factors[2]]))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_objective_never_rises_and_the_error_stays_within_the_bound(objective):
    tensor = _normal(3, 8, 7, 6)
    start = _factors((8, 7, 6), 5, batch=3, seed=9)
    start = descend(tensor, start, n_iter=15, tol=0).factors
    bound = 1.05 * _squares(tensor, start)
    last = objective_of(kruskal.balance(start), objective)
    for sweeps in (1, 2, 4, 8, 16, 32):
        found = correct(tensor, start, bound, objective, sweeps=sweeps, tol=0)
        assert bool((found.objective <= last * (1 + 1e-12)).all())
        torch.testing.assert_close(objective_of(found.factors, objective), found.objective)
        assert bool((_squares(tensor, found.factors) <= bound * (1 + 1e-8)).all())
        last = found.objective


@pytest.mark.parametrize(("noise", "steps"), [(0.05, 60), (0.3, 30)])
def test_without_slack_a_converged_fit_stays_and_with_it_the_norms_fall(noise, steps):
    """T4 of Phan et al.: only slack, or a start that was stopped early, gives freedom."""
    truth, other = _collinear((12, 10, 9), 6, 0.9), _normal(1, 12, 10, 9, seed=8)
    clean = kruskal.to_tensor(truth)
    tensor = clean + noise * other * clean.norm() / other.norm()
    start = descend(tensor, truth, n_iter=steps, tol=1e-13)
    before = objective_of(start.factors, "norms")
    still = correct(tensor, start.factors, start.squares, "norms", sweeps=20)
    moved = correct(tensor, start.factors, 1.05 * start.squares, "norms", sweeps=100)
    if noise < 0.1:  # a minimum that is attained
        assert float(still.objective / before) > 0.99
        assert float(moved.objective) < float(still.objective)
    else:
        assert float(moved.objective / before) < 0.75


def test_border_rank_tensors_stay_bounded():
    """Least squares follows the infimum that no tensor of rank 2 attains; the norms grow as the error falls."""
    tensor = _border_rank_two()
    start = descend(tensor, _factors((6, 5, 4), 2, seed=4), n_iter=200, tol=0, n_cg=100).factors
    error = float(_squares(tensor, start).sqrt() / tensor.norm())
    assert error < 0.01
    assert float(kruskal.cancellation(start)) > 10
    for bound in (0.05, 0.1):
        found = CPEPC(bound=bound).stabilise(tensor, start).factors
        assert float(_squares(tensor, found).sqrt() / tensor.norm()) <= bound * (1 + 1e-8)
        assert float(kruskal.sensitivity(found)) < 0.5 * float(kruskal.least_sensitivity(start))


def test_decompose_gives_back_a_little_error_for_far_lower_sensitivity():
    weight = kruskal.to_tensor(_collinear((16, 14, 9), 6, 0.9))[0] + 0.02 * _normal(16, 14, 9, seed=2)
    weight = weight.reshape(16, 14, 3, 3)
    plain = decompose(weight, "cp3", {"rank": 16})
    stable = decompose(weight, "cp3", {"rank": 16}, CPEPC(slack=1.04))
    assert stable.rel_error <= plain.rel_error * 1.02 + 1e-9
    assert "lower" in stable.note
    before, after = (float(kruskal.least_sensitivity(f.value.factors())) for f in (plain, stable))
    assert after < before / 2
    assert float(kruskal.sensitivity(stable.value.factors())) == pytest.approx(after)  # balanced as returned


@pytest.mark.parametrize("settings", [{"slack": 0.9}, {"bound": 0.0}, {"bound": 1.5}, {"objective": "size"}])
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(TenfoldError, match=next(iter(settings))):
        CPEPC(**settings)


def test_gauss_newton_gets_out_of_the_swamp_that_holds_alternating_updates():
    truth = _collinear((12, 12, 12), 6, 0.95)
    tensor, start = kruskal.to_tensor(truth), _factors((12, 12, 12), 6, seed=7)
    swept = start
    for _ in range(300):
        for mode in range(3):
            swept = [update_block(tensor, swept, mode, None).factor if m == mode else f for m, f in enumerate(swept)]
    found = descend(tensor, start, n_iter=300, tol=1e-12, n_cg=30)
    error = float(found.squares.sqrt() / tensor.norm())
    assert error < 1e-7
    assert float(_squares(tensor, swept).sqrt() / tensor.norm()) > 1e-4
    torch.testing.assert_close(found.squares, _squares(tensor, found.factors), rtol=1e-3, atol=1e-18)


def test_gauss_newton_products_are_those_of_the_jacobian():
    factors, step = _factors((4, 3, 2), 3), _factors((4, 3, 2), 3, seed=6)
    jacobians = torch.autograd.functional.jacobian(lambda *f: kruskal.to_tensor(f).flatten(), tuple(factors))
    moved = sum(j.flatten(1) @ s.flatten() for j, s in zip(jacobians, step, strict=True))
    for found, jacobian in zip(_gauss_newton(factors, step), jacobians, strict=True):
        torch.testing.assert_close(found.flatten(), jacobian.flatten(1).T @ moved)


def test_power_iterations_find_orthogonal_components_and_the_best_rank_one():
    frames = [torch.linalg.qr(_normal(n, 3, seed=n)).Q for n in (7, 6, 9)]
    sizes = torch.tensor([5.0, 3.0, 2.0], dtype=F64)
    tensor = kruskal.to_tensor([(frames[0] * sizes)[None], *(f[None] for f in frames[1:])])
    found, _, converged = CPPower(n_iter=200, tol=1e-14).deflate(tensor, 3)
    assert converged
    torch.testing.assert_close(kruskal.component_norms(found)[0], sizes)
    assert float(_squares(tensor, found)) < 1e-12
    tensorly, decomposition = (pytest.importorskip(name) for name in ("tensorly", "tensorly.decomposition"))
    other = _normal(1, 6, 5, 4)
    one, _, _ = CPPower(n_iter=500, tol=1e-14).deflate(other, 1)
    with tensorly.backend_context("numpy"):
        weights, _ = decomposition.parafac(other[0].numpy(), 1, n_iter_max=500, tol=1e-14, init="svd")
    assert float(kruskal.component_norms(one)) >= float(weights[0]) * 0.9999


def test_all_of_them_serve_both_formats():
    weight = _normal(6, 5, 3, 3).float()
    for format in ("cp3", "cp4"):
        for algorithm in (
            CPEPC(sweeps=5, rounds=0),
            CPPower(),
        ):
            assert algorithm.supports(FORMATS.get(format))
            fit = decompose(weight, format, {"rank": 4}, algorithm)
            assert fit.value.to_dense().dtype == torch.float32
            assert fit.rel_error < 1
