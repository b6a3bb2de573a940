"""Pure functions of tensors: the shared primitives of the decompositions. Everything is batched over leading axes."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

SVDMethod = Literal["auto", "full", "gram", "randomized"]

# Above this many rows (of the shorter side) a few leading components are found by a randomized range finder.
_RANDOMIZED_FROM = 2048

# Up to this many rows (of the shorter side) spectra are computed in float64.
_DOUBLE_UP_TO = 1024

# Rows and columns of a tile that is transposed at once: two of them stay in the cache.
_TILE = 128


class TruncatedSVD(NamedTuple):
    """``u`` (..., m, r) · diag(``s``) (..., r) · ``vh`` (..., r, n), and the method that found them."""

    u: Tensor
    s: Tensor
    vh: Tensor
    method: str


def unfold(tensor: Tensor, mode: int) -> Tensor:
    """Return the mode-n unfolding: the axis ``mode`` as rows, all others in order as columns (Kolda & Bader).

    Example:
        >>> unfold(torch.zeros(2, 3, 4), 1).shape
        torch.Size([3, 8])
    """
    return tensor.movedim(mode, 0).flatten(1)


def fold(matrix: Tensor, mode: int, shape: tuple[int, ...]) -> Tensor:
    """Return the tensor of this ``shape`` whose mode-n unfolding is ``matrix``."""
    rest = [n for axis, n in enumerate(shape) if axis != mode]
    return matrix.reshape(shape[mode], *rest).movedim(0, mode)


def mode_product(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """Return tensor ×_mode matrix: every fiber along ``mode`` multiplied by ``matrix`` (j, n)."""
    product: Tensor = torch.tensordot(matrix, tensor, dims=([1], [mode]))
    return product.movedim(0, mode)


def khatri_rao(a: Tensor, b: Tensor) -> Tensor:
    """Return the column-wise Kronecker product (..., i·j, r) of (..., i, r) and (..., j, r)."""
    return (a.unsqueeze(-2) * b.unsqueeze(-3)).flatten(-3, -2)


def gram(matrix: Tensor) -> Tensor:
    """Return A Aᵀ (..., m, m) of a matrix (..., m, n)."""
    return matrix @ matrix.mT


def symmetrize_(square: Tensor) -> Tensor:
    """Make a matrix (..., n, n) its mean with its transpose, in place and tile by tile; return it.

    As ``(square + square.mT) / 2`` to the last bit; of thousands of rows in a fifth of the time, with no copy.
    """
    for start in range(0, square.shape[-1], _TILE):
        rows = slice(start, start + _TILE)
        for other in range(0, start + 1, _TILE):
            columns = slice(other, other + _TILE)
            lower, upper = square[..., rows, columns], square[..., columns, rows]
            mean = lower.add(upper.mT).div_(2)
            lower.copy_(mean)
            if other < start:
                upper.copy_(mean.mT)
    return square


def rel_error(approximation: Tensor, target: Tensor) -> float:
    """Return ‖target − approximation‖/‖target‖; the norm of the approximation where the target is zero.

    Example:
        >>> round(rel_error(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0])), 4)
        0.8
    """
    missed, total = torch.linalg.vector_norm(approximation - target), torch.linalg.vector_norm(target)
    return float(missed / total) if total > 0 else float(missed)


def singular_values(matrix: Tensor) -> Tensor:
    """Return the singular values (..., min(m, n)), float64, descending, from the smaller Gram matrix.

    The Gram matrix is accumulated in float64, which makes them accurate to 1e-8 of the largest one: enough for every
    decision about ranks, and many times faster than an SVD. Above 1024 rows (of the shorter side) it is float32, and
    they are accurate to 1e-4 of the largest.
    """
    short = min(matrix.shape[-2:])
    a = matrix.double() if short <= _DOUBLE_UP_TO or matrix.dtype == torch.float64 else matrix.float()
    scale = a.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(a.dtype).tiny)
    a = a / scale
    square = gram(a) if a.shape[-2] <= a.shape[-1] else a.mT @ a
    values: Tensor = torch.linalg.eigvalsh(square.double()).flip(-1).clamp_min(0).sqrt()
    return values * scale.squeeze(-1).double()


def leading_eigenpairs(square: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the ``rank`` largest eigenvalues' vectors (..., n, rank) and the values, of symmetric (..., n, n)."""
    values, vectors = torch.linalg.eigh(square)
    return vectors[..., -rank:].flip(-1), values[..., -rank:].flip(-1)


def leading_eigenvectors(square: Tensor, rank: int) -> Tensor:
    """Return the eigenvectors (..., n, rank) of the largest eigenvalues of symmetric matrices (..., n, n)."""
    return leading_eigenpairs(square, rank)[0]


def truncated_svd(matrix: Tensor, rank: int, *, method: SVDMethod = "auto", seed: int = 0) -> TruncatedSVD:
    """Return the ``rank`` leading singular triplets of (..., m, n).

    Args:
        matrix: any floating dtype that ``torch.linalg`` takes (float32 or float64).
        rank: 1..min(m, n).
        method: ``full`` is LAPACK's; ``gram`` takes the eigenvectors of the smaller Gram matrix in float64 (singular
            values below 1e-8 of the largest are noise); ``randomized`` is a seeded block range finder with power
            iterations (Halko, Martinsson & Tropp 2011, algorithm 4.4); ``auto`` picks by size and says which.
        seed: of the range finder's start.
    """
    rows, cols = matrix.shape[-2:]
    if method == "auto":
        method = _choose(min(rows, cols), rank, matrix.dtype)
    if method == "full":
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return TruncatedSVD(u[..., :rank], s[..., :rank], vh[..., :rank, :], method)
    if rows > cols:
        turned = _wide(matrix.mT, rank, method, seed)
        return TruncatedSVD(turned.vh.mT, turned.s, turned.u.mT, method)
    return _wide(matrix, rank, method, seed)


def _choose(short_side: int, rank: int, dtype: torch.dtype) -> SVDMethod:
    if short_side > _RANDOMIZED_FROM and rank * 4 <= short_side:
        return "randomized"
    return "full" if dtype == torch.float64 and short_side <= 512 else "gram"


def _wide(matrix: Tensor, rank: int, method: str, seed: int) -> TruncatedSVD:
    """Find the left vectors; the rest is UᵀA, so that zero singular values are harmless."""
    u = _randomized_range(matrix, rank, seed) if method == "randomized" else _gram_range(matrix, rank)
    projected = u.mT @ matrix
    s = torch.linalg.vector_norm(projected, dim=-1)
    safe = torch.where(s > 0, s, torch.ones_like(s))
    return TruncatedSVD(u, s, projected / safe.unsqueeze(-1), method)


def _gram_range(matrix: Tensor, rank: int) -> Tensor:
    return leading_eigenvectors(gram(matrix.double()), rank).to(matrix.dtype)


def _randomized_range(matrix: Tensor, rank: int, seed: int, oversampling: int = 16, power: int = 3) -> Tensor:
    """Return orthonormal columns (..., m, rank) that span nearly the range of the leading triplets."""
    size = min(rank + oversampling, matrix.shape[-2])
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(*matrix.shape[:-2], matrix.shape[-1], size, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(matrix @ start.to(matrix)).Q
    for _ in range(power):
        basis = torch.linalg.qr(matrix.mT @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    inner = gram((basis.mT @ matrix).double())
    vectors: Tensor = basis @ leading_eigenvectors(inner, rank).to(matrix.dtype)
    return vectors
