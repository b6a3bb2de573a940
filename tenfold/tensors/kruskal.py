"""Sums of rank-1 tensors (Kruskal tensors) as their factors: one matrix (batch, n, R) per mode, a column per term.

The tensor is Σ_r u_r⁽¹⁾ ∘ u_r⁽²⁾ ∘ …. Its terms can grow without bound while they cancel in the sum, so most of what is
here measures that, and scales the columns such that it does the least harm. Any order, any floating dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod

import torch
from torch import Tensor

from tenfold.tensors.algebra import khatri_rao

Factors = Sequence[Tensor]


@dataclass(frozen=True)
class Stability:
    """How far the terms of a sum cancel, free of its scale; of a batch, all its sums taken as one.

    Attributes:
        sensitivity: to noise in the factors as they are scaled, over ‖T‖²; see ``sensitivity``.
        largest_term: the largest norm of a term over ‖T‖.
        cancellation: √(Σ λ²)/‖T‖; see ``cancellation``.
        condition: of the terms; the largest of the batch.
    """

    sensitivity: float
    largest_term: float
    cancellation: float
    condition: float

    def __str__(self) -> str:
        return f"sensitivity {self.sensitivity:.3g}, largest term {self.largest_term:.3g}"


def to_tensor(factors: Factors) -> Tensor:
    """Return the tensor (batch, n_1, …, n_N) that the factors (batch, n_m, R) stand for.

    Example:
        >>> a, b = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[3.0], [5.0]]])
        >>> to_tensor([a, b])[0].tolist()
        [[3.0, 5.0], [6.0, 10.0]]
    """
    first, *others = factors
    if not others:
        return first.sum(-1)
    flat = first @ reduce(khatri_rao, others).mT
    return flat.reshape(len(first), *(f.shape[1] for f in factors))


def column_norms(factors: Factors) -> Tensor:
    """Return the norms of all columns (batch, N, R), a row per mode."""
    tops = [f.abs().amax(1, keepdim=True) for f in factors]  # squares of the entries themselves might underflow
    return torch.stack([_length(_share(f, t), t) for f, t in zip(factors, tops, strict=True)], dim=1)


def component_norms(factors: Factors) -> Tensor:
    """Return λ (batch, R): the norms of the rank-1 terms."""
    return column_norms(factors).prod(1)


def gram_product(factors: Factors, skip: int | None = None) -> Tensor:
    """Return the elementwise product (batch, R, R) of the factors' Gram matrices, that of the mode ``skip`` left out.

    With nothing left out it holds the inner products of the rank-1 terms: its sum is the squared norm of the tensor.

    Example:
        >>> a, b = torch.ones(1, 3, 2), torch.ones(1, 4, 2)
        >>> gram_product([a, b]).sum().item(), to_tensor([a, b]).square().sum().item()
        (48.0, 48.0)
    """
    grams = [f.mT @ f for m, f in enumerate(factors) if m != skip]
    rank = factors[0].shape[-1]
    return reduce(torch.mul, grams) if grams else factors[0].new_ones(len(factors[0]), rank, rank)


def mttkrp(tensor: Tensor, factors: Factors, mode: int) -> Tensor:
    """Return the unfolding of a tensor (batch, n_1, …) times the Khatri-Rao product of the factors of the other modes.

    Shape (batch, n_mode, R). The longest other mode goes first, as one matrix product, and leaves little to sum.
    """
    longest = max((m for m in range(len(factors)) if m != mode), key=lambda m: tensor.shape[m + 1])
    partial = tensor.movedim(longest + 1, -1) @ factors[longest].reshape(
        len(tensor), *(1,) * (tensor.dim() - 3), *factors[longest].shape[1:]
    )
    return contract_rest(partial, factors, [m for m in range(len(factors)) if m != longest], mode)


def contract_rest(partial: Tensor, factors: Factors, modes: Sequence[int], keep: int) -> Tensor:
    """Return (batch, n_keep, R) from what is left of a tensor after some modes: (batch, *n of ``modes``, R).

    ``partial`` holds one slice for each column, which is summed with the columns of the other modes' factors.
    """
    left = list(modes)
    for mode in [m for m in modes if m != keep]:
        axis = left.index(mode) + 1
        shape = [1] * partial.dim()
        shape[0], shape[axis], shape[-1] = factors[mode].shape
        partial = (partial * factors[mode].reshape(shape)).sum(axis)
        left.remove(mode)
    return partial


def sensitivity(factors: Factors) -> Tensor:
    """Return (batch,) how much noise in the factors moves the tensor: lim E‖T(U + ε) − T(U)‖²/σ², ε ~ N(0, σ²).

    In closed form Σ_m n_m Σ_r Π_{k≠m} ‖u_r⁽ᵏ⁾‖² (Tichavsky, Phan & Cichocki 2019; Phan et al. 2020, arXiv 2008.05441).

    Example:
        >>> sensitivity([torch.ones(1, 2, 1), torch.ones(1, 3, 1)]).item()  # 2·3 + 3·2
        12.0
    """
    squares = column_norms(factors).square()
    return torch.stack([f.shape[1] * _others(squares, m).sum(-1) for m, f in enumerate(factors)]).sum(0)


def least_sensitivity(factors: Factors) -> Tensor:
    """Return the sensitivity (batch,) after ``balance``: N·(Π n_m)^{1/N}·Σ_r λ_r^{2(N−1)/N}."""
    order = len(factors)
    volume = prod(f.shape[1] for f in factors)
    powers = component_norms(factors).pow(2 * (order - 1) / order)
    return float(order * volume ** (1 / order)) * powers.sum(-1)


def balance(factors: Factors) -> list[Tensor]:
    """Return factors of the same tensor with the least sensitivity: ‖u_r⁽ᵐ⁾‖² in proportion to n_m in every term.

    The columns of a term that is zero all become zero.

    Example:
        >>> a, b = torch.tensor([[[8.0]]]), torch.tensor([[[1.0], [1.0]]])
        >>> a, b = balance([a, b])
        >>> round(a.norm().item(), 4), round(b.norm().item(), 4)
        (2.8284, 4.0)
    """
    return _shared(factors, [float(f.shape[1]) ** 0.5 for f in factors])


def equalize(factors: Factors) -> list[Tensor]:
    """Return factors of the same tensor whose columns have equal norms in every term.

    One learning rate and one weight decay then suit all of them: the gradient of a factor grows with the norms of the
    others.

    Example:
        >>> a, b = equalize([torch.tensor([[[8.0]]]), torch.tensor([[[2.0]]])])
        >>> round(a.item(), 4), round(b.item(), 4)
        (4.0, 4.0)
    """
    return _shared(factors, [1.0] * len(factors))


def cancellation(factors: Factors) -> Tensor:
    """Return √(Σ λ_r²)/‖T‖ (batch,): 1 for orthogonal terms, far above for terms that cancel; 0 for a zero tensor.

    Example:
        >>> a = torch.tensor([[[1.0, -0.9]]])
        >>> round(cancellation([a, torch.ones(1, 1, 2)]).item(), 2)  # 1 - 0.9
        13.45
    """
    return _share(torch.linalg.vector_norm(component_norms(factors), dim=-1), norm(factors))


def stability(factors: Factors) -> Stability:
    """Return how far the terms cancel, computed in float64.

    Example:
        >>> eye = torch.eye(2)[None]
        >>> round(stability([eye, eye]).cancellation, 12)
        1.0
    """
    wide = [f.double() for f in factors]
    norms, whole = component_norms(wide), norm(wide).square().sum()
    length = whole.sqrt()
    return Stability(
        sensitivity=float(_share(sensitivity(wide).sum(), whole)),
        largest_term=float(_share(norms.amax(), length)),
        cancellation=float(_share(torch.linalg.vector_norm(norms), length)),
        condition=float(condition(wide).amax()),
    )


def norm(factors: Factors) -> Tensor:
    """Return ‖T‖ (batch,), without making the tensor."""
    return gram_product(factors).sum((-2, -1)).clamp_min(0).sqrt()


def condition(factors: Factors) -> Tensor:
    """Return the condition number (batch,) of the terms scaled to norm 1, as columns of one matrix.

    1 for orthogonal terms, infinite for linearly dependent ones: how well the weights λ of the terms are determined by
    the tensor. Terms that are zero do not count.

    Example:
        >>> a = torch.eye(2)[None]
        >>> condition([a, a]).item()
        1.0
    """
    cosines = gram_product(_unit([f.double() for f in factors]))
    empty = torch.diagonal(cosines, dim1=-2, dim2=-1) == 0
    values = torch.linalg.eigvalsh(cosines + torch.diag_embed(empty.double()))
    least, most = values[..., 0], values[..., -1]
    # The eigenvalues carry rounding errors of about this share of the largest one: below, the terms are dependent.
    dependent = least <= values.shape[-1] * torch.finfo(torch.float64).eps * most
    return torch.where(dependent, torch.inf, (most / least.clamp_min(1e-300)).sqrt())


def _others(squares: Tensor, skip: int) -> Tensor:
    """Return the product over all modes (axis 1) but one."""
    kept = [m for m in range(squares.shape[1]) if m != skip]
    return squares[:, kept].prod(1)


def _length(scaled: Tensor, top: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(scaled, dim=1)
    return length * top.squeeze(1)


def _unit(factors: Factors) -> list[Tensor]:
    return [_share(f, n[:, None]) for f, n in zip(factors, column_norms(factors).unbind(1), strict=True)]


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """Return part/whole, zero where the whole is."""
    return torch.where(whole > 0, part / torch.where(whole > 0, whole, 1.0), 0.0)


def _shared(factors: Factors, parts: Sequence[float]) -> list[Tensor]:
    """Return factors of the same terms, column norms in proportion to ``parts``; logarithms keep extreme ones exact."""
    norms = column_norms(factors)
    alive = (norms > 0).all(1)
    logs = torch.where(alive[:, None], norms, 1.0).log()
    goal = logs.new_tensor(parts).log()
    share = (logs - goal[:, None]).mean(1)
    scaled = [torch.exp(share + goal[m]) for m in range(len(factors))]
    return [u * torch.where(alive, s, 0.0)[:, None] for u, s in zip(_unit(factors), scaled, strict=True)]
