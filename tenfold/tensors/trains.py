"""Tensor trains: TT-SVD, rounding, orthogonalisation and inner products; a matrix as a train of pairs of modes.

A train is a tuple of cores (..., r, n, r'): left rank, mode, right rank; those at the ends have rank 1 outside. A train
of a matrix (a TT-matrix) has cores (..., r, m, n, r') with an output and an input mode each, and is an ordinary train
of the modes m·n (``merge_modes`` and ``split_modes`` go from one to the other). Leading axes are a batch: trains of
equal modes and ranks. Only ``tt_svd`` needs their number, because a tensor does not show it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

from tenfold.errors import RankError, WeightError
from tenfold.tensors.algebra import truncated_svd

Cores = tuple[Tensor, ...]


def max_ranks(modes: Sequence[int]) -> tuple[int, ...]:
    """Return the rank of each bond (one fewer than modes) at which every tensor of these modes is exact.

    Example:
        >>> max_ranks((4, 9, 2, 3))
        (4, 6, 3)
    """
    left = list(accumulate(modes, lambda a, b: a * b))
    return tuple(min(n, left[-1] // n) for n in left[:-1])


def fit_ranks(modes: Sequence[int], ranks: int | Sequence[int]) -> tuple[int, ...]:
    """Return the largest ranks ≤ ``ranks`` that a train of these modes can use: r ≤ r'·n on both sides of every core.

    Args:
        modes: of the train; m·n for the train of a matrix.
        ranks: one number for all bonds, or one for each.

    Raises:
        RankError: not one positive rank for each bond.

    Example:
        >>> fit_ranks((4, 9, 2, 3), 5)
        (4, 5, 3)
        >>> fit_ranks((4, 9, 2, 3), (1, 6, 1))
        (1, 2, 1)
    """
    found = [*_each_bond(modes, ranks), 1]
    size = 1
    for k, n in enumerate(modes):
        size = found[k] = min(found[k], size * n)
    for k in reversed(range(len(modes) - 1)):
        found[k] = min(found[k], found[k + 1] * modes[k + 1])
    return tuple(found[:-1])


def tt_ranks(cores: Cores) -> tuple[int, ...]:
    """Return the ranks of the bonds between the cores."""
    return tuple(core.shape[-1] for core in cores[:-1])


def tt_modes(cores: Cores) -> tuple[int, ...]:
    """Return the modes of a train."""
    return tuple(core.shape[-2] for core in cores)


def tt_svd(
    tensor: Tensor, ranks: int | Sequence[int] | None = None, eps: float | None = None, *, batch_dims: int = 0
) -> Cores:
    """Return a train near ``tensor`` by one SVD for each bond; all its cores but the last are left-orthogonal.

    The error is at most √(d−1) times that of the best train of the same ranks; with full ranks it is rounding.
    Oseledets 2011, "Tensor-train decomposition" (SIAM J. Sci. Comput. 33), algorithm 1.

    Args:
        tensor: (*batch, n₁, ..., n_d), float32 or float64.
        ranks: an upper bound for all bonds, or exactly one rank for each: what the tensor cannot use is zeros then.
        eps: ‖A − TT‖ ≤ eps·‖A‖ for every tensor of the batch, with the smallest ranks that promise it (and at most
            ``ranks``, where that is given too).
        batch_dims: how many leading axes are the batch.

    Raises:
        RankError: not one positive rank for each bond.

    Example:
        >>> line = torch.arange(60.0, dtype=torch.float64).reshape(3, 4, 5)  # a sum of modes has ranks 2
        >>> cores = tt_svd(line, eps=1e-9)
        >>> [tuple(c.shape) for c in cores]
        [(1, 3, 2), (2, 4, 2), (2, 5, 1)]
        >>> torch.allclose(tt_to_dense(cores), line)
        True
    """
    batch, modes = tensor.shape[:batch_dims], tensor.shape[batch_dims:]
    bonds = _bonds(modes, ranks, eps)
    budget = None if eps is None else eps * _norms(tensor, batch_dims) / max(len(bonds), 1) ** 0.5
    cores, rest, left = [], tensor, 1
    for n, (most, exactly) in zip(modes, bonds, strict=False):
        frame, rest = _cut(rest.reshape(*batch, left * n, -1), most, budget, exactly)
        cores.append(frame.reshape(*batch, left, n, -1))
        left = frame.shape[-1]
    return (*cores, rest.reshape(*batch, left, modes[-1], 1))


def tt_to_dense(cores: Cores) -> Tensor:
    """Return the tensor (*batch, n₁, ..., n_d) that the cores stand for."""
    first, *others = cores
    batch, modes = first.shape[:-3], tt_modes(cores)
    dense = first.squeeze(-3)  # (..., n₁, r)
    for core in others:
        dense = (dense @ core.flatten(-2)).reshape(*batch, -1, core.shape[-1])
    return dense.reshape(*batch, *modes)


def left_orthogonalize(cores: Cores) -> Cores:
    """Return the same train with all cores but the last left-orthogonal: (r·n, r') has orthonormal columns.

    A rank that is larger than its core can carry shrinks to what it can.
    """
    found, carry = [], None
    for core in cores[:-1]:
        moved = core if carry is None else _from_left(carry, core)
        frame, carry = torch.linalg.qr(moved.flatten(-3, -2))
        found.append(frame.reshape(*moved.shape[:-1], frame.shape[-1]))
    return (*found, cores[-1] if carry is None else _from_left(carry, cores[-1]))


def right_orthogonalize(cores: Cores) -> Cores:
    """Return the same train with all cores but the first right-orthogonal: (r, n·r') has orthonormal rows."""
    return _mirrored(left_orthogonalize(_mirrored(cores)))


def tt_round(cores: Cores, ranks: int | Sequence[int] | None = None, eps: float | None = None) -> Cores:
    """Return a train of smaller ranks near the one given, as ``tt_svd`` of its tensor would, without forming that.

    Args:
        cores: the train (Oseledets 2011, algorithm 2).
        ranks: as in ``tt_svd``.
        eps: as in ``tt_svd``.

    Example:
        >>> line = tt_svd(torch.arange(60.0, dtype=torch.float64).reshape(3, 4, 5))
        >>> tt_ranks(line), tt_ranks(tt_round(line, eps=1e-9))
        ((3, 5), (2, 2))
    """
    bonds = _bonds(tt_modes(cores), ranks, eps)
    carried, *others = right_orthogonalize(cores)
    budget = None if eps is None else eps * _norms(carried, carried.dim() - 3) / max(len(bonds), 1) ** 0.5
    found = []
    for core, (most, exactly) in zip(others, bonds, strict=True):
        frame, rest = _cut(carried.flatten(-3, -2), most, budget, exactly)
        found.append(frame.unflatten(-2, carried.shape[-3:-1]))
        carried = _from_left(rest, core)
    return (*found, carried)


def tt_dot(a: Cores, b: Cores) -> Tensor:
    """Return the inner product (*batch,) of the tensors of two trains of equal modes, without forming them."""
    inner = a[0].new_ones(*a[0].shape[:-3], 1, 1)
    for one, other in zip(a, b, strict=True):
        moved = _from_left(inner, other)  # (..., r_a, n, r_b')
        inner = one.flatten(-3, -2).mT @ moved.flatten(-3, -2)
    product: Tensor = inner[..., 0, 0]
    return product


def tt_norm(cores: Cores) -> Tensor:
    """Return the Frobenius norm (*batch,) of the tensor of a train, accurate to rounding even where it is small."""
    last = left_orthogonalize(cores)[-1]
    return _norms(last, last.dim() - 3)


def tt_balance(cores: Cores) -> Cores:
    """Return the same train with cores of equal norms, which gradients and weight decay then treat alike."""
    sizes = torch.stack([_norms(core, core.dim() - 3) for core in cores])
    safe = torch.where(sizes > 0, sizes, torch.ones_like(sizes))
    common = safe.log().mean(0).exp()
    return tuple(core * (common / size)[..., None, None, None] for core, size in zip(cores, safe, strict=True))


def tt_canonical(cores: Cores) -> Cores:
    """Return the same train in the basis of every bond in which its slices are orthogonal, the largest first.

    What stands before and after index i of a bond both have the norm √σᵢ, with σ the singular values of the tensor as a
    matrix of the two (Vidal 2003, Phys. Rev. Lett. 91, 147902): what a bond does not need is zero then. Shapes stay the
    same.

    Args:
        cores: (r, n, r') without a batch, of ranks that the modes can carry (``fit_ranks``) or larger.

    Example:
        >>> column = torch.ones(1, 3, 1).double()
        >>> twice = (torch.cat([column, column], -1), torch.ones(2, 4, 1).double())  # of rank 1, written as rank 2
        >>> [round(float(c.norm()), 3) for c in tt_canonical(twice)[0].unbind(-1)]
        [2.632, 0.0]
    """
    rest = list(right_orthogonalize(cores))
    weights, frames = [], []
    for k in range(len(rest) - 1):
        u, s, vh = torch.linalg.svd(rest[k].flatten(0, 1), full_matrices=False)
        frames.append(u.reshape(*rest[k].shape[:2], -1))
        weights.append(s)
        rest[k + 1] = _from_left(s[:, None] * vh, rest[k + 1])
    frames.append(rest[-1])
    found = []
    for k, frame in enumerate(
        frames
    ):  # √σ goes to the slices before each bond, and 1/√σ to those after it, which carry σ
        before, after = (
            weights[k - 1] if k else frame.new_ones(1),
            weights[k] if k < len(weights) else frame.new_ones(1),
        )
        inverse = torch.where(before > before.max() * torch.finfo(before.dtype).eps, before, torch.inf).rsqrt()
        found.append(inverse[:, None, None] * frame * after.sqrt())
    wide = (tuple(core.shape) for core in cores)
    return tuple(_padded(core, shape) for core, shape in zip(found, wide, strict=True))


def merge_modes(cores: Cores) -> Cores:
    """Return the cores (..., r, m·n, r') of the train that a TT-matrix with cores (..., r, m, n, r') is."""
    return tuple(core.flatten(-3, -2) for core in cores)


def split_modes(cores: Cores, out_modes: Sequence[int], in_modes: Sequence[int]) -> Cores:
    """Return the cores (..., r, m, n, r') of a TT-matrix from those of its train; inverse of ``merge_modes``."""
    return tuple(core.unflatten(-2, pair) for core, *pair in zip(cores, out_modes, in_modes, strict=True))


def ttm_svd(
    matrix: Tensor,
    out_modes: Sequence[int],
    in_modes: Sequence[int],
    ranks: int | Sequence[int] | None = None,
    eps: float | None = None,
) -> Cores:
    """Return the cores (*batch, r, m, n, r') of a TT-matrix near ``matrix`` (*batch, ∏m, ∏n).

    Rows and columns are split into modes, the first mode the slowest, and paired: (m₁n₁, m₂n₂, ...) is the tensor that
    ``tt_svd`` gets (Oseledets 2010; Novikov et al. 2015, arXiv 1509.06569).

    Raises:
        WeightError: the modes do not multiply to the sides of the matrix, or are not as many on both sides.

    Example:
        >>> matrix = torch.kron(torch.rand(2, 3), torch.rand(4, 5))  # of rank 1 in just these modes
        >>> cores = ttm_svd(matrix, (2, 4), (3, 5), ranks=1)
        >>> [tuple(c.shape) for c in cores]
        [(1, 2, 3, 1), (1, 4, 5, 1)]
        >>> torch.allclose(ttm_to_dense(cores), matrix, atol=1e-6)
        True
    """
    tensor = paired(matrix, out_modes, in_modes)
    return split_modes(tt_svd(tensor, ranks, eps, batch_dims=matrix.dim() - 2), out_modes, in_modes)


def paired(matrix: Tensor, out_modes: Sequence[int], in_modes: Sequence[int]) -> Tensor:
    """Return the tensor (*batch, m₁n₁, m₂n₂, ...) with the entries of ``matrix`` (*batch, ∏m, ∏n)."""
    rows, cols = matrix.shape[-2:]
    if len(out_modes) != len(in_modes) or (prod(out_modes), prod(in_modes)) != (rows, cols):
        msg = f"the modes {tuple(out_modes)} and {tuple(in_modes)} do not make a matrix of {rows}×{cols}"
        raise WeightError(msg)
    lead, d = matrix.dim() - 2, len(out_modes)
    apart = matrix.reshape(*matrix.shape[:-2], *out_modes, *in_modes)
    order = [*range(lead), *(lead + side * d + k for k in range(d) for side in (0, 1))]
    modes = [m * n for m, n in zip(out_modes, in_modes, strict=True)]
    return apart.permute(order).reshape(*matrix.shape[:-2], *modes)


def unpaired(tensor: Tensor, out_modes: Sequence[int], in_modes: Sequence[int]) -> Tensor:
    """Return the matrix (*batch, ∏m, ∏n) with the entries of ``tensor`` (*batch, m₁n₁, ...); inverse of ``paired``."""
    d = len(out_modes)
    batch = tensor.shape[: tensor.dim() - d]
    lead = len(batch)
    apart = tensor.reshape(*batch, *(n for pair in zip(out_modes, in_modes, strict=True) for n in pair))
    order = [*range(lead), *range(lead, lead + 2 * d, 2), *range(lead + 1, lead + 2 * d, 2)]
    return apart.permute(order).reshape(*batch, prod(out_modes), prod(in_modes))


def ttm_to_dense(cores: Cores) -> Tensor:
    """Return the matrix (*batch, ∏m, ∏n) that the cores (*batch, r, m, n, r') stand for."""
    out_modes, in_modes = [c.shape[-3] for c in cores], [c.shape[-2] for c in cores]
    return unpaired(tt_to_dense(merge_modes(cores)), out_modes, in_modes)


def tt_core_std(std: float, ranks: Sequence[int]) -> float:
    """Return the standard deviation of independent core entries at which those of the dense tensor have ``std``.

    An entry is a sum of ∏r products of d core entries, so its variance is ∏r·σ²ᵈ: σ = (std²/∏r)^(1/2d) with d one more
    than there are ``ranks`` (Hrinchuk et al. 2020, arXiv 1901.10787; Tjandra et al. 2018, arXiv 1802.10410).

    Example:
        >>> round(tt_core_std(0.05, (16, 16)), 4)
        0.1462
    """
    return float((std**2 / prod(ranks)) ** (0.5 / (len(ranks) + 1)))


def tt_randn(
    modes: Sequence[int], ranks: int | Sequence[int], std: float = 1.0, *, generator: torch.Generator | None = None
) -> Cores:
    """Return random normal cores (r, n, r') whose dense tensor has entries of mean 0 and standard deviation ``std``.

    One number as ``ranks`` is clipped to what each bond can use.
    """
    bonds = fit_ranks(modes, ranks) if isinstance(ranks, int) else _each_bond(modes, ranks)
    sigma, sides = tt_core_std(std, bonds), (1, *bonds, 1)
    return tuple(torch.randn(sides[k], n, sides[k + 1], generator=generator) * sigma for k, n in enumerate(modes))


def _each_bond(modes: Sequence[int], ranks: int | Sequence[int]) -> tuple[int, ...]:
    found = (ranks,) * (len(modes) - 1) if isinstance(ranks, int) else tuple(ranks)
    if len(found) != len(modes) - 1 or min(found, default=1) < 1:
        msg = f"a train of {len(modes)} modes has {len(modes) - 1} ranks ≥ 1, not {found}"
        raise RankError(msg)
    return found


def _bonds(modes: Sequence[int], ranks: int | Sequence[int] | None, eps: float | None) -> list[tuple[int, int | None]]:
    """Return for each bond the most that its rank can be, and exactly what it is to be where that is said."""
    most = fit_ranks(modes, max_ranks(modes) if ranks is None else ranks)
    if ranks is None or isinstance(ranks, int) or eps is not None:
        return [(r, None) for r in most]
    return list(zip(most, ranks, strict=True))


def _norms(tensor: Tensor, batch_dims: int) -> Tensor:
    axes = tuple(range(batch_dims, tensor.dim()))
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=axes)
    return norms


def _needed(s: Tensor, budget: Tensor) -> int:
    """Return how many leading singular values (*batch, r) to keep so that the rest is within ``budget`` (*batch,)."""
    tail = s.square().flip(-1).cumsum(-1).flip(-1)  # what goes where this one and all smaller ones go
    return max(int((tail > budget.unsqueeze(-1).square()).sum(-1).max()), 1)


def _cut(matrix: Tensor, most: int, budget: Tensor | None, exactly: int | None) -> tuple[Tensor, Tensor]:
    """Return orthonormal columns (..., m, r) and the rest (..., r, n) of a matrix, zeros where it has less to give."""
    found = truncated_svd(matrix, min(most, *matrix.shape[-2:]))
    keep = found.s.shape[-1] if budget is None else _needed(found.s, budget)
    frame, rest = found.u[..., :keep], found.s[..., :keep, None] * found.vh[..., :keep, :]
    return (frame, rest) if exactly is None else (_widened(frame, exactly), _widened(rest.mT, exactly).mT)


def _widened(matrix: Tensor, width: int) -> Tensor:
    """Return the matrix (..., m, r) with columns of zeros up to ``width``."""
    return torch.cat([matrix, matrix.new_zeros(*matrix.shape[:-1], width - matrix.shape[-1])], dim=-1)


def _from_left(matrix: Tensor, core: Tensor) -> Tensor:
    """Return the core (..., s, n, r') that ``matrix`` (..., s, r) makes of one (..., r, n, r')."""
    made: Tensor = (matrix @ core.flatten(-2)).unflatten(-1, core.shape[-2:])
    return made


def _mirrored(cores: Cores) -> Cores:
    return tuple(core.transpose(-3, -1) for core in reversed(cores))


def _padded(core: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the core with zeros behind its slices, up to ``shape``."""
    padded = core.new_zeros(shape)
    padded[tuple(slice(n) for n in core.shape)] = core
    return padded
