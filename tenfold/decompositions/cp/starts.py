"""Where alternating least squares starts: at random, from singular vectors, algebraically, or from known factors.

All return for each mode factors (batch, starts, n, R).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import prod

import torch
from torch import Tensor

from tenfold.tensors import khatri_rao, kruskal


def random_start(sizes: Sequence[int], rank: int, *, count: int, seed: int, like: Tensor) -> list[Tensor]:
    """Return ``count`` starts of normal numbers, the same for every tensor of a batch of the length of ``like``."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(count, n, rank, generator=generator, dtype=torch.float64) for n in sizes]
    return [f.to(like).expand(len(like), *f.shape) for f in drawn]


def singular_start(tensor: Tensor, rank: int, *, seed: int) -> list[Tensor]:
    """Return the leading left singular vectors of every unfolding, filled up with normal numbers (HOSVD)."""
    sizes = tensor.shape[1:]
    filling = random_start(sizes, rank, count=1, seed=seed, like=tensor)
    factors = []
    for mode, fill in enumerate(filling):
        side = tensor.movedim(mode + 1, 1).flatten(2).double()
        lead = torch.linalg.eigh(side @ side.mT)[1].flip(-1)[..., :rank].to(tensor)
        factors.append(torch.cat([lead[:, None], fill[..., lead.shape[-1] :] * sizes[mode] ** -0.5], dim=-1))
    return factors


def known_start(factors: Sequence[Tensor], rank: int, *, seed: int) -> list[Tensor]:
    """Return known factors (batch, n, R₀) at another rank: the terms of the largest norms, or filled up at random."""
    norms = kruskal.component_norms(factors)
    order = norms.argsort(dim=-1, descending=True)[:, None, :rank]
    kept = [f.gather(2, order.expand(-1, f.shape[1], -1)) for f in factors]
    missing = rank - kept[0].shape[-1]
    if missing > 0:
        sizes = [f.shape[1] for f in factors]
        level = norms.mean(-1).clamp_min(torch.finfo(norms.dtype).tiny) ** (1 / len(factors))
        filling = random_start(sizes, missing, count=1, seed=seed, like=factors[0])
        kept = [
            torch.cat([f, fill[:, 0] * level[:, None, None] * n**-0.5], dim=-1)
            for f, fill, n in zip(kept, filling, sizes, strict=True)
        ]
    return [f[:, None] for f in kept]


def algebraic_start(tensor: Tensor, rank: int, *, seed: int) -> list[Tensor] | None:
    """Return the factors that two mixtures of slices have in common, exact for tensors of such a rank without noise.

    The generalised eigenvectors of a pencil of two matrices (Sanchez & Kowalski 1990; Leurgans, Ross & Abel 1993):
    with X_k = A·diag(c_k)·Bᵀ, the columns of A are the eigenvectors of (Σ u_k X_k)(Σ v_k X_k)⁻¹. Finds as many terms as
    the two longest modes have, ``rank`` at most; the others are random. None for matrices.
    """
    sizes = tensor.shape[1:]
    if len(sizes) < 3:
        return None
    a, b = sorted(sorted(range(len(sizes)), key=lambda m: -sizes[m])[:2])
    rest = [m for m in range(len(sizes)) if m not in (a, b)]
    solved = [_pencil(x.double(), rank, a, b, rest, seed) for x in tensor]
    filling = random_start(sizes, rank, count=1, seed=seed + 1, like=tensor)
    filled = []
    for mode, fill in enumerate(filling):
        columns = fill.clone()
        for i, factors in enumerate(solved):
            columns[i, 0, :, : factors[mode].shape[-1]] = factors[mode].to(columns)
        filled.append(columns)
    return filled


def _pencil(tensor: Tensor, rank: int, a: int, b: int, rest: list[int], seed: int) -> list[Tensor]:
    """Return for each mode (n, r) of one tensor, r ≤ ``rank`` as the numerical ranks of the modes a and b allow."""
    slices = tensor.permute(*rest, a, b).flatten(0, len(rest) - 1)  # (rest, a, b)
    left, right = (_leading(slices.movedim(m, 0).flatten(1), rank) for m in (1, 2))
    size = min(left.shape[1], right.shape[1])
    left, right = left[:, :size], right[:, :size]
    core = left.T @ slices @ right  # (rest, r, r)
    mixed = _leading(core.flatten(1), 2)
    pair = torch.einsum("km,kab->mab", mixed, core)
    if len(pair) < 2:  # all slices alike: a matrix
        u, s, vh = torch.linalg.svd(pair[0])
        outer, inner = u * s, vh.T
    else:
        turn = torch.randn(2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        first, second = torch.einsum("mn,mab->nab", torch.linalg.qr(turn).Q, pair)
        vectors = torch.linalg.eig(_solved(second.T, first.T).T)[1]
        outer = torch.where(_repeated(vectors), vectors.imag, vectors.real)
        inner = _solved(outer, first).T
    inner = inner / torch.linalg.vector_norm(inner, dim=0).clamp_min(1e-300)
    shares = _solved(khatri_rao(outer, inner), core.flatten(1).T).T  # (rest, r)
    factors: dict[int, Tensor] = {a: left @ outer, b: right @ inner}
    factors |= dict(zip(rest, _split(shares, [tensor.shape[m] for m in rest]), strict=True))
    return [factors[m] for m in range(tensor.dim())]


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    """Return the least squares solution, by the SVD: torch's default way to find it is not the same each time.

    That way, ``gelsy`` of LAPACK, is handed an array of pivots without initial values, and pivots as they happen to be.
    """
    solution: Tensor = torch.linalg.lstsq(matrix.cpu(), right.cpu(), driver="gelsd").solution
    return solution.to(matrix.device)


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """Return the leading left singular vectors, up to ``rank``, of those values that are not rounding."""
    u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
    kept = int((s > 1e-9 * s[0]).sum()) if float(s[0]) > 0 else 1
    vectors: Tensor = u[:, : min(rank, max(kept, 1))]
    return vectors


def _repeated(vectors: Tensor) -> Tensor:
    """Return which columns are the second of a conjugate pair: these get the imaginary part, the first the real one."""
    paired = vectors.imag.abs().amax(0) > 1e-9 * vectors.abs().amax(0)
    second: Tensor = paired.cumsum(0) % 2 == 0
    return paired & second


def _split(shares: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Return for each short mode (n, r) what is nearest to a rank-one tensor in each column (prod(sizes), r)."""
    if len(sizes) == 1:
        return [shares]
    block = shares.T.reshape(-1, *sizes)
    factors = [torch.linalg.svd(block.movedim(m + 1, 1).flatten(2))[0][..., 0].T for m in range(len(sizes))]
    whole = reduce(khatri_rao, factors)
    factors[0] = factors[0] * (whole * shares).sum(0)
    return factors


def fibers(tensor: Tensor, rank: int) -> list[Tensor]:
    """Return for each mode (batch, n, R) the exact sum of all fibers of the longest mode.

    R is at least the product of the other modes; terms beyond that are zero.
    """
    sizes = tensor.shape[1:]
    longest = max(range(len(sizes)), key=lambda m: sizes[m])
    others = [n for m, n in enumerate(sizes) if m != longest]
    count = prod(others)
    places = torch.unravel_index(torch.arange(count, device=tensor.device), others)
    units = [
        torch.nn.functional.one_hot(p, n).T.to(tensor).expand(len(tensor), -1, -1)
        for p, n in zip(places, others, strict=True)
    ]
    units.insert(longest, tensor.movedim(longest + 1, 1).flatten(2))
    return [torch.nn.functional.pad(u, (0, rank - count)) for u in units]
