"""Laws that an algorithm obeys on every format that it supports."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tenfold.decompositions import Decomposition, FitRequest, decompose_many, recompress
from tenfold.errors import WeightError
from tenfold.formats import Factorization, Rank, split_groups
from tenfold.tensors import rel_error
from tenfold.testing.covariance_laws import COVARIANCE_LAWS
from tenfold.testing.geometries import GEOMETRIES, Geometry, served
from tenfold.testing.laws import expect, law
from tenfold.testing.trials import LOCAL_SLACK, SLACK, Trial
from tenfold.testing.weights import (
    DTYPES,
    broken_weights,
    lowest_error,
    odd_weights,
    random_factors,
    random_weight,
    some_ranks,
)

# What may be left of a weight of lower rank: superfluous rank-one terms are not determined, and sweeps slow down.
_SUPERFLUOUS = 1e-3

# Of the random weight that several laws look at.
_SEED = 2


def check_exact(trial: Trial) -> None:
    """Raise LawBroken unless full rank reproduces the weight to rounding."""
    spec = trial.at.spec
    for dtype in (torch.float64, torch.float32):
        weight = random_weight(spec, dtype)
        with law(1, trial, dtype):
            fit = trial.fit(weight, trial.format.max_rank(spec))
            seen = rel_error(fit.value.to_dense().double(), weight.double())
            expect(seen <= lowest_error(dtype), f"relative error {seen:.3g} at full rank")


def check_monotone(trial: Trial) -> None:
    """Raise LawBroken if a larger rank has a larger error (unless ``initializer_only``), or a fit misstates its own."""
    spec = trial.at.spec
    weight = random_weight(spec, seed=_SEED)
    last = math.inf
    for rank in some_ranks(trial.format, spec, 5):
        with law(2, trial, rank):
            fit = trial.random_fit(_SEED, rank)
            seen = rel_error(fit.value.to_dense(), weight)
            expect(
                abs(seen - fit.rel_error) <= 1e-7, f"the fit reports the error {fit.rel_error:.6g}, it is {seen:.6g}"
            )
            expect(fit.value.rank == rank, f"the factors have rank {fit.value.rank}")
            falls = trial.algorithm.initializer_only or seen <= last * (1 + SLACK) + 1e-6
            expect(falls, f"the error rises from {last:.6g} to {seen:.6g}")
            last = seen


def check_bounds(trial: Trial) -> None:
    """Raise LawBroken unless the squared error lies between the largest dropped tail and the sum of all of them.

    No approximation whose unfolding has rank r is nearer than that unfolding's best one (Eckart & Young 1936); cutting
    all unfoldings one after the other adds up their tails at most (De Lathauwer et al. 2000; Oseledets 2011). Formats
    that say so (``svd_bounds_error``) have no such upper bound.
    """
    spec = trial.at.spec
    weight = random_weight(spec, seed=_SEED)
    total = float(weight.square().sum())
    spectra = {
        name: torch.linalg.svdvals(matrix)
        for name, matrix in trial.format.unfoldings(split_groups(weight, spec), spec).items()
    }
    for rank in some_ranks(trial.format, spec, 5):
        unfolded = trial.format.unfolding_ranks(spec, rank)
        tails = [float(values[:, unfolded[name] :].square().sum()) for name, values in spectra.items()]
        with law(6, trial, rank):
            square = trial.random_fit(_SEED, rank).rel_error ** 2 * total
            slack = 1e-9 * total
            expect(square >= max(tails) * (1 - 1e-6) - slack, f"{square:.6g} is below the lower bound {max(tails):.6g}")
            above = sum(tails) * (1 + SLACK) + slack if trial.format.svd_bounds_error else total
            expect(square <= above, f"the squared error {square:.6g} is above the bound {sum(tails):.6g}")


def check_recovery(trial: Trial) -> None:
    """Raise LawBroken unless a weight that has a rank is found at that rank, exactly, and at the next ones too.

    At the next ones it is enough to come near where the factors are not determined (not ``svd_bounds_error``). Where a
    format pads the weight there is nothing to find: what the factors had in the padding is not in the weight. Nor need
    algorithms that only start what others finish (``initializer_only``), or whose factors are ``structured``.
    """
    spec = trial.at.spec
    if trial.algorithm.initializer_only or trial.algorithm.structured:
        return
    apart = split_groups(random_weight(spec), spec)
    if any(matrix.numel() > apart.numel() for matrix in trial.format.unfoldings(apart, spec).values()):
        return
    ranks = some_ranks(trial.format, spec)
    planted = ranks[len(ranks) // 2 - 1] if len(ranks) > 1 else ranks[0]
    for dtype in trial.dtypes:
        weight = random_factors(trial.format, spec, planted).to_dense().to(dtype)
        for rank in (r for r in ranks if all(r[k] >= planted[k] for k in planted)):
            with law(6, trial, rank, f"a {dtype} weight of rank {planted}"):
                fit = trial.fit(weight, rank)
                near = 2 * lowest_error(dtype)
                if rank != planted and not trial.format.svd_bounds_error:
                    near = max(near, _SUPERFLUOUS)
                expect(fit.rel_error <= near, f"relative error {fit.rel_error:.3g}")


def check_recompressed(trial: Trial) -> None:
    """Raise LawBroken unless factors are compressed further as well as the dense weight that they stand for.

    Where the error depends on the start (not ``svd_bounds_error``) it may be smaller, and a little larger.
    """
    spec, name = trial.at.spec, trial.format.name()
    ranks = some_ranks(trial.format, spec)
    larger = ranks[len(ranks) // 2]
    value = random_factors(trial.format, spec, larger)
    for rank in (r for r in ranks if r != larger and all(r[k] <= larger[k] for k in larger)):
        with law(12, trial, f"from {larger} to {rank}"):
            again = recompress(value, name, rank, trial.algorithm)
            direct = trial.fit(value.to_dense(), rank)
            seen = rel_error(again.value.to_dense(), value.to_dense())
            expect(again.value.rank == rank, f"the factors have rank {again.value.rank}")
            expect(abs(seen - again.rel_error) <= 1e-7, f"the fit reports the error {again.rel_error}, it is {seen}")
            local = not trial.format.svd_bounds_error
            worse = seen - direct.rel_error if local else abs(seen - direct.rel_error)
            same = worse <= (LOCAL_SLACK if local else SLACK) * direct.rel_error + 1e-7
            expect(same, f"relative error {seen:.6g}, from the dense weight {direct.rel_error:.6g}")


def check_deterministic(trial: Trial) -> None:
    """Raise LawBroken unless the same seed gives the same bytes, whatever torch's own generator did, and leaves it."""
    weight = random_weight(trial.at.spec, torch.float32, seed=4)
    rank = some_ranks(trial.format, trial.at.spec)[0]
    with law(7, trial, rank), torch.random.fork_rng(devices=[]):
        first = trial.fit(weight, rank)
        torch.manual_seed(12345)
        before = torch.get_rng_state()
        # What lies in free memory is another thing each time: operations that read before they write show it.
        _ = [torch.full((n,), float("nan")) for n in range(1, 512)]
        second = trial.fit(weight.clone(), rank)
        expect(torch.equal(before, torch.get_rng_state()), "torch's own generator was used")
        for name, tensor in first.value.tensors().items():
            expect(torch.equal(tensor, second.value.tensors()[name]), f"{name} differs from run to run")
        again = Decomposition.from_dict(trial.algorithm.to_dict())
        expect(again == trial.algorithm, f"from_dict(to_dict()) gives {again}, not {trial.algorithm}")


def check_batched(trial: Trial) -> None:
    """Raise LawBroken unless weights decomposed together come out as they do alone."""
    spec, name = trial.at.spec, trial.format.name()
    ranks = some_ranks(trial.format, spec, 5)
    rank = ranks[len(ranks) // 2]
    weights = [random_weight(spec, seed=seed) * scale for seed, scale in ((_SEED, 1.0), (6, 1e-3), (7, 50.0))]
    with law(7, trial, rank, "three at once"):
        together = decompose_many([FitRequest(w, spec, name, rank, trial.algorithm) for w in weights])
        first = trial.random_fit(_SEED, rank)
        for weight, fit in zip(weights, together, strict=True):
            alone = first if weight is weights[0] else trial.fit(weight, rank)
            # Together they stop together, so each may be better than alone, but never worse. Sweeps that tell errors by
            # inner products see none below the root of rounding, and stop somewhere there.
            least = 1e-9 if trial.format.svd_bounds_error else 1e-7
            most = alone.rel_error * (1 + SLACK) + least
            expect(fit.rel_error <= most, f"{fit.rel_error} > {alone.rel_error} alone")


def check_odd_weights(trial: Trial) -> None:
    """Raise LawBroken unless zero, constant, tiny, huge and spiked weights come out right, or are refused clearly."""
    spec = trial.at.spec
    ranks = some_ranks(trial.format, spec)
    for dtype in trial.dtypes:
        for name, weight in odd_weights(spec, dtype).items():
            for rank in (ranks[len(ranks) // 2], ranks[-1]):
                with law(14, trial, rank, f"a {name} weight in {dtype}"):
                    _expect_right(trial, weight, rank, may_overflow=name == "huge")
    with law(14, trial, "the weight that was given"):
        weight = random_weight(spec)
        before = weight.clone()
        trial.fit(weight, ranks[0])
        expect(torch.equal(weight, before), "the weight was written to")


def _expect_right(trial: Trial, weight: Tensor, rank: Rank, *, may_overflow: bool) -> None:
    try:
        fit = trial.fit(weight, rank)
    except WeightError as error:
        expect(may_overflow and "overflow" in str(error), f"refused: {error}")
        return
    dense = fit.value.to_dense()
    expect(dense.dtype == weight.dtype, f"the factors have dtype {dense.dtype}")
    expect(bool(torch.isfinite(dense).all()), "the factors are not finite")
    exact = fit.value.to(torch.float64).to_dense()
    scale = float(weight.abs().max().double()) or 1.0
    seen = rel_error(exact / scale, weight.double() / scale)
    noise = lowest_error(weight.dtype)
    expect(abs(seen - fit.rel_error) <= 2 * noise, f"the fit reports the error {fit.rel_error:.3g}, it is {seen:.3g}")
    full = rank == trial.format.max_rank(trial.at.spec)
    flat = not bool((weight - weight.view(-1)[0]).any()) and not trial.algorithm.structured
    expect(seen <= (2 * noise if full or flat else 1 + noise), f"relative error {seen:.3g}")


def check_broken_weights(trial: Trial) -> None:
    """Raise LawBroken unless weights with NaN or infinite entries are refused."""
    rank = some_ranks(trial.format, trial.at.spec)[0]
    for dtype in DTYPES:
        for name, weight in broken_weights(trial.at.spec, dtype).items():
            with law(14, trial, f"a {name} entry in {dtype}"):
                try:
                    fit = trial.fit(weight, rank)
                except WeightError:
                    continue
                expect(kept=False, seen=f"decomposed without an error, to {fit.rel_error}")


ALGORITHM_LAWS: dict[str, Callable[[Trial], None]] = {
    "exact": check_exact,
    "monotone": check_monotone,
    "bounds": check_bounds,
    "recovery": check_recovery,
    "recompressed": check_recompressed,
    "deterministic": check_deterministic,
    "batched": check_batched,
    "odd_weights": check_odd_weights,
    "broken_weights": check_broken_weights,
    **COVARIANCE_LAWS,
}


def check_algorithm_laws(
    algorithm: Decomposition,
    format: type[Factorization],
    name: str,
    geometries: tuple[Geometry, ...] = GEOMETRIES,
) -> None:
    """Raise LawBroken unless an algorithm obeys one of ``ALGORITHM_LAWS`` on a format, wherever that serves.

    Stride, padding and the like do not matter here: of geometries whose weights are alike only the first is tried. Of
    formats that take many sweeps each time (not ``svd_bounds_error``), only full rank is tried everywhere, and all
    else at one geometry of each kind, number of axes, and grouping, as are the laws with data of all formats;
    algorithms that say they are ``slow`` one of each kind and grouping, in the widest dtype and the one of the smallest
    range. There all dtypes are tried at the first geometry, and one of them in turn at each of the others.
    """
    seen: set[Any] = set()
    dtypes = (torch.float64, torch.float16) if algorithm.slow else DTYPES
    few = name in COVARIANCE_LAWS or (name != "exact" and not format.svd_bounds_error)
    for at in served(format, geometries):
        kind = at.spec.groups > 1
        shape = kind if algorithm.slow else (at.spec.axes, kind) if few else at.spec.group_shape
        key = (at.spec.kind == "embedding", at.spec.kind == "conv_transpose", shape)
        if key not in seen:
            tried = (dtypes[len(seen) % len(dtypes)],) if few and seen else dtypes
            ALGORITHM_LAWS[name](Trial(algorithm, format, at, tried))
            seen.add(key)
