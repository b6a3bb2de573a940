"""CP decomposition by alternating least squares: the sum of R rank-one tensors that is nearest to a tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch
from torch import Tensor

from tenfold.decompositions.base import DECOMPOSITIONS
from tenfold.decompositions.cp.base import KruskalDecomposition, KruskalFit
from tenfold.decompositions.cp.starts import algebraic_start, fibers, known_start, random_start, singular_start
from tenfold.decompositions.cp.sweeps import Swept, alternate
from tenfold.decompositions.cp.tucker_compression import TuckerCompression
from tenfold.decompositions.curves import CurveProblem, ErrorCurve
from tenfold.errors import RankError, WeightError
from tenfold.tensors import kruskal

Start = Literal["auto", "random", "hosvd", "algebraic"]

# Tensors of so few entries are decomposed in float64 and from several starts: both cost next to nothing.
_SMALL = 1 << 14
_SMALL_STARTS = 3

# Larger tensors are swept in the leading singular vectors of their long modes first, this many for each term, and whole
# in the last tenth of the sweeps: what the compression drops is hardly part of the best terms.
_COMPRESSED_FROM = 1 << 16
_COLUMNS = 1.25
_POLISH = 0.1

# With several starts, the best after so many sweeps goes on alone; small tensors can wait for longer.
_RACE, _SMALL_RACE = 10, 30


# Of the fits of a curve.
_QUICK_SWEEPS = 12


@dataclass(frozen=True, eq=False, kw_only=True)
class CPFit(KruskalFit):
    """Factors of a batch of tensors, scaled to the least sensitivity, and how far they are from the tensors.

    Attributes:
        rel_errors: ‖X − X̂‖/‖X‖ (batch,), from inner products: those below 1e-4 are rough in float32.
    """

    rel_errors: Tensor


@DECOMPOSITIONS.register("cp_als")
@dataclass(frozen=True)
class CPALS(KruskalDecomposition):
    """Alternating least squares for CP: two passes over the weight a sweep, extrapolated, terms kept from cancelling.

    Carroll & Chang 1970, Harshman 1970; the sweeps share their contractions (Phan, Tichavský & Cichocki 2013), each
    starts ahead of the last one (Ang, Cohen, Gillis & Hien 2019), and modes are compressed before (Bro & Andersson
    1998): without loss where they have less than full rank, and large weights to a quarter more columns than terms for
    all but the last tenth of the sweeps. A best approximation may not exist, and plain sweeps then creep along
    with ever larger terms that cancel; a small penalty on the norms of the terms, in proportion to the squared error,
    prevents that and makes the error fall faster. The factors are scaled to the least sensitivity.

    Attributes:
        n_iter: sweeps at most.
        tol: stop when the error falls by less than this share of itself in a sweep.
        ridge: weight of Σ λ_r² beside the squared error, as a share of the relative squared error; 0 for plain ALS.
        start: random; hosvd, the leading singular vectors; algebraic, from the eigenvectors of a pencil of slices,
            exact without noise; auto: random, and for small weights the best of three random ones and the algebraic.
        restarts: how many random starts; the best after ten sweeps goes on (thirty for small weights).
        momentum: whether sweeps are extrapolated.
        compress: whether modes are compressed first.
        balance: whether columns are scaled to the least sensitivity in the end; otherwise they stay as the sweeps leave
            them, for comparison with software that returns those.
    """

    n_iter: int = 200
    tol: float = 5e-5
    ridge: float = 3e-3
    start: Start = "auto"
    restarts: int = 1
    momentum: bool = True
    compress: bool = True
    balance: bool = True

    def fit_tensor(self, tensor: Tensor, rank: int, start: Sequence[Tensor] | None = None) -> CPFit:
        """Return one factor for each mode: see ``fit_cp``."""
        return fit_cp(tensor, rank, self, start=start)

    def error_curve(self, problem: CurveProblem) -> ErrorCurve:
        """Return the curve between fits of few sweeps."""
        return problem.between_fits(self.with_settings({"n_iter": _QUICK_SWEEPS}))


def fit_cp(tensor: Tensor, rank: int, settings: CPALS | None = None, *, start: Sequence[Tensor] | None = None) -> CPFit:
    """Return the sum of ``rank`` rank-one tensors that alternating least squares finds for each tensor of a batch.

    Args:
        tensor: (batch, n_1, …, n_N), N ≥ 2, float32 or float64, of any scale.
        rank: at least 1; from the least product of all modes but one on, the fit is exact and takes no sweep.
        settings: sweeps, tolerance, starts.
        start: for each mode factors (batch, n, R₀) to go on from, of any rank R₀; raced against the other starts when
            these are as many.

    Raises:
        WeightError: a tensor that is empty, of order 1 or not finite.
        RankError: a rank below 1.

    Example:
        >>> x = torch.randn(1, 6, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> fit = fit_cp(x, 8)
        >>> [tuple(f.shape) for f in fit.factors]
        [(1, 6, 8), (1, 5, 8), (1, 4, 8)]
        >>> fit_cp(x, 20).rel_errors.item()
        0.0
    """
    settings = settings or CPALS()
    _check(tensor, rank)
    scale = tensor.abs().flatten(1).amax(1)
    scale = torch.where(scale > 0, scale, 1.0).reshape(-1, *(1,) * (tensor.dim() - 1))
    scaled = tensor if bool((scale == 1).all()) else tensor / scale
    sizes = tuple(tensor.shape[1:])
    if rank >= prod(sizes) // max(sizes):
        none = torch.zeros(len(tensor), dtype=torch.float64, device=tensor.device)
        return _cp_fit(kruskal.balance(fibers(scaled, rank)), scale, none, tensor.dtype, "exact")
    small = scaled[0].numel() <= _SMALL
    wide = scaled.double() if small else scaled
    most = math.ceil(_COLUMNS * rank) if scaled[0].numel() >= _COMPRESSED_FROM else None
    compressed = TuckerCompression.of(wide, most) if settings.compress else TuckerCompression.trivial(wide)
    known = None if start is None else [f.to(wide) for f in start]
    if known is not None:
        known = compressed.project([known[0] / scale.reshape(-1, 1, 1).to(wide), *known[1:]])
    names, starts = _starts(compressed.core, rank, settings, known, small=small)
    polish = 0 if compressed.lossless else max(round(_POLISH * settings.n_iter), 1)
    best, note, sweeps, converged, squares = _race(
        compressed.core, names, starts, replace(settings, n_iter=max(settings.n_iter - polish, 1))
    )
    best = compressed.lift(best)
    if polish:
        del compressed, starts  # the whole tensor needs their memory
        last = _sweep(wide, [f[:, None] for f in best], settings, max(settings.n_iter - sweeps, polish))
        best, squares, converged = last.best(), last.squares[:, 0], last.converged
        sweeps += len(last.history)
    total = torch.linalg.vector_norm(wide.flatten(1), dim=1, dtype=torch.float64).square()
    missed = (squares / torch.where(total > 0, total, 1.0)).sqrt()
    best = [f * (total > 0).to(f)[:, None, None] for f in best]
    best = kruskal.balance([f.double() for f in best]) if settings.balance else best
    return _cp_fit(best, scale, missed, tensor.dtype, note, n_iter=sweeps, converged=converged)


def _check(tensor: Tensor, rank: int) -> None:
    if tensor.dim() < 3 or tensor.numel() == 0:
        msg = f"CP needs tensors (batch, n_1, n_2, ...) with entries, not the shape {tuple(tensor.shape)}"
        raise WeightError(msg)
    if rank < 1:
        msg = f"the rank {rank} is below 1: a sum needs at least one term"
        raise RankError(msg)
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        msg = f"the tensor has {bad} NaN or infinite entries of {tensor.numel()}: repair it first"
        raise WeightError(msg)


def _cp_fit(
    factors: Sequence[Tensor],
    scale: Tensor,
    errors: Tensor,
    dtype: torch.dtype,
    note: str,
    *,
    n_iter: int = 0,
    converged: bool = True,
) -> CPFit:
    """Return the fit of tensors that were divided by ``scale``."""
    share = scale.reshape(-1, 1, 1).double() ** (1 / len(factors))
    stored = tuple((f * share).to(dtype) for f in factors)
    return CPFit(factors=stored, rel_errors=errors, n_iter=n_iter, converged=converged, note=note)


def _starts(
    core: Tensor, rank: int, settings: CPALS, known: list[Tensor] | None, *, small: bool
) -> tuple[list[str], list[Tensor]]:
    """Return the names of the starts and for each mode the factors (batch, starts, n, R)."""
    kinds: list[tuple[str, list[Tensor] | None]] = []
    if known is not None:
        kinds.append(("known factors", known_start(known, rank, seed=settings.seed)))
    if settings.start == "hosvd":
        kinds.append(("hosvd", singular_start(core, rank, seed=settings.seed)))
    if settings.start == "algebraic" or (settings.start == "auto" and small):
        kinds.append(("algebraic", algebraic_start(core, rank, seed=settings.seed)))
    drawn = settings.restarts if settings.start in ("auto", "random") and (known is None or small) else 0
    if settings.start == "auto" and small:
        drawn = max(drawn, _SMALL_STARTS)
    if drawn or not any(start for _, start in kinds):
        drawn = max(drawn, 1)
        random = random_start(core.shape[1:], rank, count=drawn, seed=settings.seed, like=core)
        kinds.extend((f"random {i}", [f[:, i : i + 1] for f in random]) for i in range(drawn))
    starts = [(name, start) for name, start in kinds if start is not None]
    return [name for name, _ in starts], [torch.cat(mode, dim=1) for mode in zip(*(s for _, s in starts), strict=True)]


def _race(
    core: Tensor, names: list[str], starts: list[Tensor], settings: CPALS
) -> tuple[list[Tensor], str, int, bool, Tensor]:
    """Return the best factors, the start that led there, the sweeps, whether they converged, and the squared errors."""
    used = 0
    note = names[0]
    if len(names) > 1:
        race = _SMALL_RACE if core[0].numel() <= _SMALL else _RACE
        heats = _sweep(core, starts, settings, min(race, settings.n_iter))
        used, won = len(heats.history), heats.squares.argmin(1)
        note = ", ".join(dict.fromkeys(names[i] for i in won.tolist()))
        starts = [f[:, None] for f in heats.best()]
        if heats.converged or used >= settings.n_iter:
            return heats.best(), note, used, heats.converged, heats.squares.amin(1)
    last = _sweep(core, starts, settings, settings.n_iter - used)
    return last.best(), note, used + len(last.history), last.converged, last.squares[:, 0]


def _sweep(core: Tensor, starts: list[Tensor], settings: CPALS, n_iter: int) -> Swept:
    return alternate(core, starts, n_iter=n_iter, tol=settings.tol, momentum=settings.momentum, ridge=settings.ridge)
