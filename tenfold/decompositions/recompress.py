"""Fit layers: dense ones, and factorized ones at the cost of their factors instead of the dense weight's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tenfold.decompositions.base import Decomposition, algorithm_for
from tenfold.decompositions.fitting import Fit, FitRequest, decompose_many, refuse_overflow, spec_of_weight
from tenfold.decompositions.input_moments import Moments
from tenfold.formats import FORMATS, Factorization, Rank, Reduced
from tenfold.records import LayerSpec
from tenfold.tensors import plain_arithmetic, rel_error

Lift = Callable[[Fit], Fit]

# Frames cost two QR decompositions: they pay when the small weight has less than this share of the dense one's entries.
_WORTH = 0.8


def fit_layer(
    weight: Tensor | Factorization,
    format: str,
    rank: Rank,
    algorithm: Decomposition | Mapping[str, Any] | str | None = None,
    *,
    spec: LayerSpec | None = None,
    moments: Moments | None = None,
) -> Fit:
    """Return the fit of a layer, dense or factorized: ``decompose`` or ``recompress``, as its weight asks for."""
    algorithm = algorithm_for(format, algorithm, data_aware=moments is not None)
    request, lift = layer_request(weight, format, rank, algorithm, spec=spec, moments=moments)
    return lift(decompose_many([request])[0])


@plain_arithmetic()
def layer_request(
    weight: Tensor | Factorization,
    format: str,
    rank: Rank,
    algorithm: Decomposition,
    *,
    spec: LayerSpec | None = None,
    moments: Moments | None = None,
) -> tuple[FitRequest, Lift]:
    """Return what to decompose for a layer, and the function that makes of its fit one of the layer's own weight.

    Many such requests can be solved at once by ``decompose_many`` or ``fit_batches``.
    """
    if isinstance(weight, Factorization):
        return _recompression(weight, format, rank, algorithm, moments)
    return FitRequest(weight, spec or spec_of_weight(weight), format, rank, algorithm, moments), lambda fit: fit


def recompress(
    value: Factorization,
    format: str,
    rank: Rank,
    algorithm: Decomposition | Mapping[str, Any] | str | None = None,
    *,
    moments: Moments | None = None,
) -> Fit:
    """Return the best factorization of the weight that ``value`` stands for, as if decomposed from that dense weight.

    In the same format at smaller ranks only small matrices are decomposed (MUSCO, Gusak et al. 2019, section 3, made
    exact for factors that are no longer orthonormal after training); otherwise the dense weight is multiplied out.

    Args:
        value: the factors so far.
        format: name of the format to go to.
        rank: ranks by name; a name left out stands for full rank.
        algorithm: the format's default algorithm if None.
        moments: of the layer's inputs; with these the dense weight is multiplied out.

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
    return fit_layer(value, format, rank, algorithm, moments=moments)


def _recompression(
    value: Factorization, format: str, rank: Rank, algorithm: Decomposition, moments: Moments | None
) -> tuple[FitRequest, Lift]:
    dtype = next(iter(value.tensors().values())).dtype
    wide = value.to(torch.float64 if dtype == torch.float64 else torch.float32)
    rank = FORMATS.get(format).check_rank(value.spec, rank)
    small = _reduced(wide, format, rank, algorithm) if moments is None else None
    if small is None:
        start = wide if format == value.name() else None
        request = FitRequest(wide.to_dense(), value.spec, format, rank, algorithm, moments, start)
    else:
        request = FitRequest(small.weight, small.spec, small.format, rank, algorithm, start=small.start)

    @plain_arithmetic()
    def lift(fit: Fit) -> Fit:
        stored = (fit.value if small is None else small.lift(fit.value)).to(dtype)
        refuse_overflow(stored, request.weight)
        if dtype in (torch.float32, torch.float64):
            return dataclasses.replace(fit, value=stored)
        error = rel_error(stored.to(torch.float32).to_grouped(), wide.to_grouped())  # rounding to 16 bits shows
        return dataclasses.replace(fit, value=stored, rel_error=error)

    return request, lift


def _reduced(value: Factorization, format: str, rank: Rank, algorithm: Decomposition) -> Reduced | None:
    """Return the small weight to decompose, or None where only the dense one will do or costs no more."""
    if format != value.name() or any(rank[name] > current for name, current in value.rank.items()):
        return None
    if not all(torch.isfinite(t).all() for t in value.tensors().values()):
        return None  # the dense weight gets the error that says so
    small = value.reduced()
    if small is None or small.weight.numel() > _WORTH * value.spec.num_params:
        return None
    kind = FORMATS.get(small.format)
    return small if kind.unsupported_reason(small.spec) is None and algorithm.supports(kind) else None
