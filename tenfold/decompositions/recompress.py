"""Further compression of what is factorized already, at the cost of its factors instead of the dense weight's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from tenfold.decompositions.base import (
    Decomposition,
    Fit,
    Problem,
    decompose_many,
    default_algorithm,
    refuse_overflow,
)
from tenfold.decompositions.metric import Moments
from tenfold.formats import FORMATS, Factorization, Rank, Reduced
from tenfold.tensors import rel_error

Lift = Callable[[Fit], Fit]

# Frames cost two QR decompositions: they pay when the small weight has less than this share of the dense one's entries.
_WORTH = 0.8


def recompress(
    value: Factorization,
    format: str,
    rank: Rank,
    algorithm: Decomposition | None = None,
    *,
    metric: Moments | None = None,
) -> Fit:
    """Return the best factorization of the weight that ``value`` stands for, as if decomposed from that dense weight.

    In the same format at smaller ranks only small matrices are decomposed (MUSCO, Gusak et al. 2019, section 3, made
    exact for factors that are no longer orthonormal after training); otherwise the dense weight is multiplied out.

    Args:
        value: the factors so far.
        format: name of the format to go to.
        rank: ranks by name; a name left out stands for full rank.
        algorithm: the format's default algorithm if None.
        metric: moments of the layer's inputs; with these the dense weight is multiplied out.

    Raises:
        RankError: a rank outside of what the weight allows.
        WeightError: a weight with NaN or infinite entries, or one that the format refuses.

    Example:
        >>> from tenfold.decompositions import decompose
        >>> first = decompose(torch.diag(torch.arange(8.0)), "low_rank", {"rank": 6}).value
        >>> fit = recompress(first, "low_rank", {"rank": 3})
        >>> fit.value.left.shape, round(fit.rel_error**2, 4)  # (2² + 3² + 4²)/(2² + ... + 7²)
        (torch.Size([1, 8, 3]), 0.2086)
    """
    algorithm = algorithm or default_algorithm(format, aware=metric is not None)
    problem, lift = reduce(value, format, rank, algorithm, metric=metric)
    return lift(decompose_many([problem])[0])


def reduce(
    value: Factorization, format: str, rank: Rank, algorithm: Decomposition, *, metric: Moments | None = None
) -> tuple[Problem, Lift]:
    """Return the problem to solve, and what makes of its fit one of the weight that ``value`` stands for.

    Many such problems can be solved at once by ``decompose_many``.
    """
    dtype = next(iter(value.tensors().values())).dtype
    wide = value.to(torch.float64 if dtype == torch.float64 else torch.float32)
    rank = FORMATS.get(format).check_rank(value.spec, rank)
    small = _reduced(wide, format, rank, algorithm) if metric is None else None
    if small is None:
        start = wide if format == value.name() else None
        problem = Problem(wide.to_dense(), value.spec, format, rank, algorithm, metric, start)
    else:
        problem = Problem(small.weight, small.spec, small.format, rank, algorithm, start=small.start)

    def lift(fit: Fit) -> Fit:
        found = fit.value if small is None else small.lift(fit.value)
        stored = found.to(dtype)
        refuse_overflow(stored, problem.weight)
        if dtype in (torch.float32, torch.float64):
            return dataclasses.replace(fit, value=stored)
        error = rel_error(stored.to(torch.float32).to_grouped(), wide.to_grouped())  # rounding to 16 bits shows
        return dataclasses.replace(fit, value=stored, rel_error=error)

    return problem, lift


def _reduced(value: Factorization, format: str, rank: Rank, algorithm: Decomposition) -> Reduced | None:
    """Return the small weight to decompose, or None where only the dense one will do or costs no more."""
    if format != value.name() or any(rank[name] > own for name, own in value.rank.items()):
        return None
    if not all(torch.isfinite(t).all() for t in value.tensors().values()):
        return None  # the dense weight gets the error that says so
    small = value.reduced()
    if small is None or small.weight.numel() > _WORTH * value.spec.num_params:
        return None
    kind = FORMATS.get(small.format)
    return small if kind.refuses(small.spec) is None and algorithm.serves(kind) else None
