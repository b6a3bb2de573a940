"""CP factors with the least sensitivity, or the smallest components, within an error bound: block by block, exactly.

With all factors but one fixed, the least Σ_r d_r ‖a_r‖² under ‖T − T̂‖ ≤ δ has a closed form, A = M (Γ + μ D)⁻¹ with the
one μ at which the error is δ: a ridge regression whose weight follows from the bound (Phan et al. 2020, arXiv
2008.05441; error preserving correction, Phan, Tichavsky & Cichocki 2019, arXiv 1709.08349).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tenfold.tensors import kruskal

Objective = Literal["sensitivity", "norms"]

# Eigenvalues below this share of the largest one are taken to be that share: components that are collinear.
_CLIPPED = 1e-12

# Rounding of the error that a block can reach, as a share of ‖T‖².
_NOISE = 1e-15


class Block(NamedTuple):
    """A new factor (batch, n, R), and the squared error (batch,) that it would have without the objective."""

    factor: Tensor
    least: Tensor


@dataclass(frozen=True, eq=False)
class Corrected:
    """Balanced factors, the objective at which they are (batch,), sweeps used, and whether those came to rest."""

    factors: list[Tensor]
    objective: Tensor
    sweeps: int
    converged: bool


def objective_of(factors: Sequence[Tensor], objective: Objective) -> Tensor:
    """Return (batch,) the sensitivity, or Σ λ_r² of the components' norms."""
    if objective == "sensitivity":
        return kruskal.sensitivity(factors)
    return kruskal.component_norms(factors).square().sum(-1)


def update_block(
    tensor: Tensor, factors: Sequence[Tensor], mode: int, bound: Tensor | None, objective: Objective = "sensitivity"
) -> Block:
    """Return the factor of one mode with the least objective at a squared error of at most ``bound``.

    Args:
        tensor: (batch, n_1, …), float64.
        factors: (batch, n_m, R) of each mode.
        mode: which of them to replace.
        bound: squared errors (batch,) above zero; where no factor of this mode reaches one, and where it is None, the
            least squares factor is returned.
        objective: of the whole tensor; see ``objective_of``.

    Example:
        >>> tensor = torch.ones(1, 2, 2, 2, dtype=torch.float64)
        >>> unit = [torch.ones(1, 2, 1, dtype=torch.float64)] * 3
        >>> block = update_block(tensor, unit, 0, torch.tensor([2.0], dtype=torch.float64))
        >>> block.factor.flatten().tolist(), block.least.item()  # (1 − a)²·8 = 2
        ([0.5, 0.5], 0.0)
    """
    products, square = kruskal.mttkrp(tensor, factors, mode), kruskal.gram_product(factors, mode)
    root = _weights(factors, mode, objective, square).sqrt()
    values, vectors = torch.linalg.eigh(square / (root.unsqueeze(-1) * root.unsqueeze(-2)))
    values = torch.maximum(values, _CLIPPED * values[:, -1:]).clamp_min(torch.finfo(values.dtype).tiny)
    turned = (products / root.unsqueeze(-2)) @ vectors
    power = turned.square().sum(-2) / values  # what each direction takes off the squared error
    least = tensor.flatten(1).square().sum(-1) - power.sum(-1)
    kept = 1 / values
    if bound is not None:
        room = bound - least
        scale = stretch(values, power, torch.where(room > 0, room, 1.0))
        kept = torch.where((room > 0).unsqueeze(-1), scale.unsqueeze(-1) / (1 + values * scale.unsqueeze(-1)), kept)
    return Block((turned * kept.unsqueeze(-2)) @ vectors.mT / root.unsqueeze(-2), least)


def stretch(values: Tensor, power: Tensor, room: Tensor, *, steps: int = 60) -> Tensor:
    """Return ν ≥ 0 (batch,) with Σ_r power_r/(1 + values_r·ν)² = ``room``, or 0 where all of the power fits into it.

    The secular equation for μ = 1/ν. Its inverse square root is concave and nearly straight in ν, so that Newton's
    method climbs to the root from the left in a few steps (as in trust regions; Moré & Sorensen 1983).
    """
    nu = torch.zeros_like(room)
    for _ in range(steps):
        grown = 1 + values * nu.unsqueeze(-1)
        sum_, slope = (power / grown.square()).sum(-1), (power * values / grown.pow(3)).sum(-1)
        step = (room.rsqrt() - sum_.rsqrt()) * sum_.pow(1.5) / slope
        nu = (nu + torch.nan_to_num(step, nan=0.0, posinf=0.0, neginf=0.0)).clamp_min(0)
        if bool((step.abs() <= 1e-7 * nu).all()):  # quadratic: the next one would be rounding
            break
    return nu


def _weights(factors: Sequence[Tensor], mode: int, objective: Objective, square: Tensor) -> Tensor:
    """Return d (batch, R): the objective as a function of one factor is Σ_r d_r ‖a_r‖², and a constant."""
    if objective == "norms":
        weights = torch.diagonal(square, dim1=-2, dim2=-1)
    else:
        others = [m for m in range(len(factors)) if m != mode]
        squares = {m: factors[m].square().sum(1) for m in others}
        ones = torch.ones_like(square[:, 0])
        parts = [reduce(torch.mul, (squares[k] for k in others if k != m), ones * factors[m].shape[1]) for m in others]
        weights = torch.stack(parts).sum(0)
    top = weights.amax(-1, keepdim=True)
    return torch.where(top > 0, torch.maximum(weights, 1e-24 * top), 1.0)  # terms that vanish stay at zero


def correct(
    tensor: Tensor,
    factors: Sequence[Tensor],
    bound: Tensor,
    objective: Objective = "sensitivity",
    *,
    sweeps: int = 200,
    tol: float = 1e-3,
) -> Corrected:
    """Return factors with a lower objective whose squared error stays within ``bound``; the objective never rises.

    Sweeps over the modes start from a point beyond the last one, in the direction of the last change, as long as that
    pays: a sweep that does not lower the objective is dropped, and the next one goes less far.

    Args:
        tensor: (batch, n_1, …), float64.
        factors: where to start, with a squared error of at most ``bound``.
        bound: squared errors (batch,).
        objective: what to lower.
        sweeps: at most.
        tol: stop when a sweep lowers the objective by less than this share, on average over the last ten.
    """
    best = kruskal.balance(factors)
    value = objective_of(best, objective)
    before, reach, history = best, torch.full_like(value, _REACH), [value]
    noise = _NOISE * tensor.flatten(1).square().sum(-1)
    done, converged = 0, False
    while done < sweeps and not converged:
        tried, least = _sweep(tensor, _beyond(best, before, reach), bound, objective)
        now = objective_of(tried, objective)
        lower = (now < value) & (least <= bound * (1 + 1e-9) + noise)
        before = _either(lower, best, before)
        best = _either(lower, tried, best)
        value = torch.where(lower, now, value)
        reach = torch.where(lower, (_GROWTH * reach).clamp(_REACH, _FARTHEST), reach / 4)
        stuck = reach < _NEAREST  # go on from here without a direction
        before = _either(stuck, best, before)
        reach = torch.where(stuck, _REACH, reach)
        history.append(value)
        done += 1
        if done >= _CALM:
            converged = bool((history[-1 - _CALM] - value <= _CALM * tol * value).all())
    return Corrected(best, value, done, converged)


_REACH, _NEAREST, _FARTHEST, _GROWTH, _CALM = 0.5, 0.05, 10.0, 1.1, 10


def refine(tensor: Tensor, factors: Sequence[Tensor], sweeps: int) -> list[Tensor]:
    """Return factors after ``sweeps`` of plain alternating least squares from these, balanced."""
    refined = list(factors)
    for _ in range(sweeps):
        refined, _ = _sweep(tensor, refined, None, "norms")
    return refined


def _sweep(
    tensor: Tensor, factors: list[Tensor], bound: Tensor | None, objective: Objective
) -> tuple[list[Tensor], Tensor]:
    """Return all factors updated in turn and balanced, and the least error that the last one could have had."""
    updated, least = list(factors), tensor.new_zeros(len(tensor))
    for mode in range(len(updated)):
        updated[mode], least = update_block(tensor, updated, mode, bound, objective)
    return kruskal.balance(updated), least


def _beyond(best: list[Tensor], before: list[Tensor], reach: Tensor) -> list[Tensor]:
    return [b + reach[:, None, None] * (b - p) for b, p in zip(best, before, strict=True)]


def _either(here: Tensor, these: list[Tensor], those: list[Tensor]) -> list[Tensor]:
    return [torch.where(here[:, None, None], a, b) for a, b in zip(these, those, strict=True)]
