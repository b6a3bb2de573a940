"""Decompose weights: one, or many at once, in batches of equal shape that workers can share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tenfold.decompositions.base import (
    DECOMPOSITIONS,
    Decomposition,
    Factors,
    FitProblem,
    algorithm_for,
)
from tenfold.decompositions.covariance import blocks, is_tall
from tenfold.decompositions.input_moments import Moments
from tenfold.decompositions.roots import Root
from tenfold.errors import RankError, TenfoldError, WeightError
from tenfold.formats import FORMATS, Factorization, Rank, split_groups
from tenfold.parallel import Workers
from tenfold.records import LayerSpec
from tenfold.tensors import plain_arithmetic, rel_error
from tenfold.tensors.kruskal import Stability

# Larger weights fill the machine alone; stacking them would only cost memory. Smaller ones are faster together.
_STACK_BELOW = 1 << 17
_TINY = 1e-30


@dataclass(frozen=True)
class Fit:
    """A factorization with how well it approximates the weight.

    Attributes:
        value: the factors, in the dtype and on the device of the weight.
        rel_error: ‖W − Ŵ‖/‖W‖ of the factors as they are stored.
        n_iter: sweeps used; 1 for direct methods.
        converged: whether the stop rule was met before the sweeps ran out.
        note: what the algorithm chose by itself, such as the SVD method.
        output_error: with moments, the relative error √(E‖y−ŷ‖²/E‖y−ȳ‖²) of the output with the bias shifted.
        bias_shift: with moments, what to add to the bias (out,) so that the mean output is as it should be.
    """

    value: Factorization
    rel_error: float
    n_iter: int = 1
    converged: bool = True
    note: str = ""
    output_error: float | None = None
    bias_shift: Tensor | None = None

    @property
    def stability(self) -> Stability | None:
        """How far the terms of the factors cancel; None for formats whose factors cannot diverge."""
        return self.value.stability()


@dataclass(frozen=True, eq=False)
class FitRequest:
    """One weight to decompose, in torch's own layout: into which format, at which rank, by which algorithm.

    ``moments`` and ``start`` are as for ``decompose``.
    """

    weight: Tensor
    spec: LayerSpec
    format: str
    rank: Rank
    algorithm: Decomposition
    moments: Moments | None = None
    start: Factorization | None = None

    @property
    def fits_outputs(self) -> bool:
        """Whether the error of the output is minimised."""
        return self.moments is not None and self.algorithm.uses_covariance

    @property
    def batch_key(self) -> tuple[Any, ...]:
        """What requests have in common that are decomposed together."""
        alone = self.weight.numel() > _STACK_BELOW or self.moments is not None or self.start is not None
        shape, weight = self.spec.group_shape, self.weight
        return (
            *(shape, weight.shape, weight.dtype, weight.device, self.format, repr(self.rank), self.algorithm),
            id(self) if alone else None,
        )


def decompose(
    weight: Tensor,
    format: str,
    rank: Rank,
    algorithm: Decomposition | Mapping[str, Any] | str | None = None,
    *,
    spec: LayerSpec | None = None,
    moments: Moments | None = None,
    start: Factorization | None = None,
) -> Fit:
    """Return the best factorization of a weight that the algorithm finds at this rank.

    Args:
        weight: (out, in) or (out, in, *kernel), any floating dtype, on any device.
        format: name of a registered format.
        rank: ranks by name; a name left out stands for full rank.
        algorithm: or its name or ``to_dict()``; the format's default algorithm if None; with moments, the one that
            minimises the output error.
        spec: geometry of the layer that holds the weight; needed for groups, transposed convolutions and embeddings.
        moments: of the layer's inputs. An algorithm that does not use them ignores them, but the fit has its output
            error all the same.
        start: factors of the weight in this format at any rank, from which algorithms with ``supports_start`` continue
            (CP). Others do not depend on where they start, and those that use the covariance choose their own start.

    Raises:
        RankError: a rank outside of what the weight allows.
        WeightError: a weight with NaN or infinite entries, or one that the format refuses.

    Example:
        >>> fit = decompose(torch.eye(6)[:, :, None, None].expand(6, 6, 3, 3), "tucker2", {"out": 6, "in": 4})
        >>> round(fit.rel_error, 4)
        0.5774
    """
    if not isinstance(weight, Tensor):
        msg = f"the weight is a {type(weight).__name__}, not a tensor: pass torch.as_tensor(weight)"
        raise WeightError(msg)
    if not isinstance(rank, Mapping):
        msg = f"ranks go by name, such as {{'{FORMATS.get(format).rank_names[0]}': 8}}, not {rank!r}"
        raise RankError(msg)
    algorithm = algorithm_for(format, algorithm, data_aware=moments is not None)
    request = FitRequest(weight, spec or spec_of_weight(weight), format, rank, algorithm, moments, start)
    return decompose_many([request])[0]


@plain_arithmetic()
def decompose_many(requests: Sequence[FitRequest]) -> list[Fit]:
    """Return one fit for each request; weights of equal shape are decomposed together, which is faster when small.

    Raises:
        RankError, WeightError: as for ``decompose``.
    """
    fits: dict[int, Fit] = {}
    for members in batches_of(requests):
        fits.update(zip(members, _fit_batch([requests[i] for i in members]), strict=True))
    return [fits[i] for i in range(len(requests))]


def fit_batches(
    requests: Sequence[FitRequest], workers: Workers | None = None
) -> Iterator[tuple[list[int], list[Fit | TenfoldError]]]:
    """Iterate over batches of requests: their indices, and for each its fit or the reason why there is none.

    Args:
        requests: what to decompose.
        workers: who decomposes weights on the CPU, with the same factors as here; this process if None.
    """
    batches = batches_of(requests)
    if workers is None or workers.is_local or any(r.weight.device.type != "cpu" for r in requests):
        return ((members, _fit_each(None, [requests[i] for i in members])) for members in batches)
    detached = ([_detached(requests[i]) for i in members] for members in batches)
    return zip(batches, workers.map(_fit_each, None, detached), strict=True)


def batches_of(requests: Sequence[FitRequest]) -> list[list[int]]:
    """Return the indices of the requests in batches that are decomposed together, wherever that is.

    Example:
        >>> weights = [torch.ones(4, 4), torch.ones(4, 6), torch.ones(4, 4)]
        >>> svd = algorithm_for("low_rank")
        >>> batches_of([FitRequest(w, spec_of_weight(w), "low_rank", {"rank": 2}, svd) for w in weights])
        [[0, 2], [1]]
    """
    batches: dict[tuple[Any, ...], list[int]] = {}
    for i, request in enumerate(requests):
        batches.setdefault(request.batch_key, []).append(i)
    return list(batches.values())


def spec_of_weight(weight: Tensor) -> LayerSpec:
    """Return the geometry of a plain linear layer or convolution with this weight.

    Raises:
        WeightError: the weight is empty, or does not have 2 to 5 axes.
    """
    if not 2 <= weight.dim() <= 5:
        msg = f"a weight needs 2 to 5 axes (out, in, *kernel), not the shape {tuple(weight.shape)}"
        raise WeightError(msg)
    if 0 in weight.shape:
        msg = f"the weight is empty: shape {tuple(weight.shape)}"
        raise WeightError(msg)
    out, inner, *kernel = weight.shape
    return LayerSpec(kind="conv" if kernel else "linear", in_channels=inner, out_channels=out, kernel=tuple(kernel))


def refuse_overflow(value: Factorization, weight: Tensor) -> None:
    """Raise WeightError if the factors of ``weight`` do not fit into their dtype."""
    if not all(torch.isfinite(t).all() for t in value.tensors().values()):
        dtype = next(iter(value.tensors().values())).dtype
        msg = (
            f"the {value.name()} factors overflow {dtype}: the weight's largest entry is "
            f"{float(weight.abs().max()):.3g}. Convert the model to float32 first."
        )
        raise WeightError(msg)


def _fit_each(shared: None, requests: Sequence[FitRequest]) -> list[Fit | TenfoldError]:
    try:
        return list(decompose_many(requests))
    except TenfoldError as error:
        if len(requests) == 1:
            return [error]
    return [result for request in requests for result in _fit_each(shared, [request])]


def _detached(request: FitRequest) -> FitRequest:
    # A view would take the whole tensor that it looks at to the worker.
    return dataclasses.replace(request, weight=request.weight.detach().clone())


def _fit_batch(requests: Sequence[FitRequest]) -> list[Fit]:
    prepared = [_prepare(request) for request in requests]
    first, (weight, scale) = requests[0], prepared[0]
    if first.moments is not None and first.fits_outputs:
        factors, value = _fit_outputs(first, first.moments, weight, scale)
        values = [value]
    else:
        kind, groups = FORMATS.get(first.format), first.spec.groups
        stacked = weight if len(requests) == 1 else torch.cat([w for w, _ in prepared])
        known = first.start if first.algorithm.supports_start else None
        start = None if known is None else known.to(stacked).scaled(1 / (scale or 1.0))
        rank = kind.check_rank(first.spec, first.rank)
        factors = first.algorithm.fit(FitProblem(stacked, first.spec, kind, rank, start=start))
        values = []
        for i, (request, (_, scale)) in enumerate(zip(requests, prepared, strict=True)):
            rows = slice(i * groups, (i + 1) * groups)
            tensors = {k: None if v is None else v[rows] for k, v in factors.tensors.items()}
            values.append(kind(request.spec, **tensors).scaled(scale))
    pairs = zip(requests, values, prepared, strict=True)
    return [_measured(request, value, factors, weight, scale) for request, value, (weight, scale) in pairs]


def _prepare(request: FitRequest) -> tuple[Tensor, float]:
    """Check a request, and return its weight, groups apart and scaled to a largest entry of 1, and that scale."""
    weight, spec = request.weight.detach(), request.spec
    kind = FORMATS.get(request.format)
    refusal = kind.unsupported_reason(spec)
    if refusal is not None:
        msg = f"{request.format} does not serve {spec}: {refusal}"
        raise WeightError(msg)
    if not request.algorithm.supports(kind):
        finders = [n for n, d in DECOMPOSITIONS.items() if d.supports(kind)]
        msg = f"{request.algorithm.name()} does not find {request.format} factors. Use {' or '.join(finders)}."
        raise RankError(msg)
    kind.check_rank(spec, request.rank)
    if not weight.is_floating_point():
        msg = f"the weight has dtype {weight.dtype}: only floating point weights can be factorized"
        raise WeightError(msg)
    if weight.is_meta:
        msg = "the weight is on the meta device and has no values: load the model first"
        raise WeightError(msg)
    if not torch.isfinite(weight).all():
        bad = int((~torch.isfinite(weight)).sum())
        msg = f"the weight has {bad} NaN or infinite entries of {weight.numel()}: repair the model or keep this layer"
        raise WeightError(msg)
    if request.moments is not None:
        request.moments.check(spec.group_shape)
    compute = request.algorithm.dtype
    double = compute == "float64" or (compute == "auto" and weight.dtype == torch.float64)
    if request.fits_outputs and is_tall(split_groups(weight, spec).flatten(2)):
        # It is scaled with its target. What needs more precision is done on the side of the inputs.
        return split_groups(weight, spec).to(torch.float64 if weight.dtype == torch.float64 else torch.float32), 1.0
    wide = torch.float64 if double else torch.float32
    scale = float(weight.abs().max())
    # Subnormal entries would overflow the reciprocal of the scale, so such weights are lifted in float64.
    groups = split_groups(weight, spec).to(torch.float64 if 0 < scale < _TINY else wide)
    return (groups / (scale or 1.0)).to(wide), scale


def _fit_outputs(request: FitRequest, moments: Moments, weight: Tensor, scale: float) -> tuple[Factors, Factorization]:
    """Return the factors with the least error of the output, in coordinates where all output errors count alike."""
    kind, spec, algorithm = FORMATS.get(request.format), request.spec, request.algorithm
    rank, moments = kind.check_rank(spec, request.rank), moments.to(weight.device)
    weighed = algorithm.weighs_outputs and moments.output_gram is not None
    # The last factor undoes the change of coordinates, where it is a layer of its own.
    undone = not weighed and isinstance(kind.structure(spec, rank)[-1], LayerSpec)
    root = moments.output_root() if undone else None
    scaled, top = _target(weight, scale, moments, root, algorithm.covariance_ridge)
    gram = moments.ridged_gram() if weighed else None
    factors = algorithm.fit(FitProblem(scaled, spec, kind, rank, moments.covariance(), output_gram=gram))
    del scaled  # it may be as large as all else
    value, factors = kind(spec, **factors.tensors), dataclasses.replace(factors, tensors={})
    return factors, (value if root is None else _restored(value, root, rank)).scaled(top)


def _restored(value: Factorization, root: Root, rank: Rank) -> Factorization:
    """Return factors for the outputs themselves, of those for outputs that were multiplied by a root."""
    *others, last = value.chain()
    restored = root.solve(last.flatten(2)).view_as(last)
    return value.from_chain(value.spec, rank, (*others, restored)).balanced()  # undoing it has stretched the outputs


def _target(weight: Tensor, scale: float, moments: Moments, root: Root | None, ridge: float) -> tuple[Tensor, float]:
    """Return what is to be approximated, in the coordinates of the root and of a size of about 1, and its size."""
    flat = weight.flatten(2)
    target = flat.clone() if is_tall(flat) else _doubled(weight, scale)  # tall ones are not scaled yet
    target = moments.regression_target(target, ridge, out=target)
    top = float(torch.linalg.vector_norm(target, ord=torch.inf)) or 1.0
    scaled = (target if root is None else root.times_(target)).div_(top)
    return scaled.view(weight.shape).to(weight.dtype), top


def _doubled(weight: Tensor, scale: float) -> Tensor:
    return weight.flatten(2).to(torch.float64, copy=True).mul_(scale)


def _measured(request: FitRequest, value: Factorization, factors: Factors, weight: Tensor, scale: float) -> Fit:
    """Return the fit with its errors, measured on the factors as they are stored."""
    value = value.to(request.weight.dtype)
    refuse_overflow(value, request.weight)
    if request.moments is None:
        stored = value.to(weight.dtype).scaled(1 / scale if scale > _TINY else 1.0)
        error = rel_error(stored.to_grouped(), weight if scale > _TINY else weight * scale)
        return Fit(value, error, factors.n_iter, factors.converged, factors.note)
    moments, dense = request.moments.to(weight.device), value.to(weight.dtype).to_grouped().flatten(2)
    off, norm, missed, power, shift = 0.0, 0.0, 0.0, 0.0, []
    for rows in blocks(dense):
        flat, own, approximation = _doubled(weight[:, rows], scale), moments.of_outputs(rows), dense[:, rows].double()
        lost, whole = own.errors(flat, approximation)
        missed, power = missed + float(lost.sum()), power + float(whole.sum())
        off = math.hypot(off, torch.linalg.vector_norm(approximation - flat))
        norm = math.hypot(norm, torch.linalg.vector_norm(flat))
        shift.append(own.bias_shift(flat, approximation))
    return Fit(
        value,
        off / norm if norm else off,
        factors.n_iter,
        factors.converged,
        factors.note,
        output_error=(missed / power) ** 0.5 if power > 0 else 0.0,
        bias_shift=torch.cat(shift, dim=1).flatten(),
    )
