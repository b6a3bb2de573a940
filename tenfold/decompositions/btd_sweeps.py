"""Sums of Tucker-2 blocks as parts: factors and cores of all blocks at once, for white inputs or under the data."""

from __future__ import annotations

import torch
from torch import Tensor

from tenfold.decompositions.parts import DIRECT, Parts, solve, solve_by_steps
from tenfold.decompositions.parts_under import Layout
from tenfold.tensors import gram, leading_eigenvectors
from tenfold.tensors.conjugate_gradients import dot, each


class Blocks:
    """A batch of kernels (batch, out, in, K) to meet by sums of blocks.

    The parts are the factors of the outputs (batch, blocks, out, r_out), the cores (batch, blocks, r_out, r_in, K) and
    the factors of the inputs (batch, blocks, in, r_in).
    """

    def __init__(self, tensor: Tensor) -> None:
        self.power = tensor.flatten(1).square().sum(-1)
        self._by_out = tensor.transpose(2, 3).contiguous()  # (batch, out, K, in)
        self._by_in = tensor.permute(0, 2, 3, 1).contiguous()  # (batch, in, K, out)

    def sweep(self, parts: Parts, ridge: Tensor) -> tuple[Parts, Tensor, Tensor]:
        """Return the factors of the outputs, those of the inputs and the cores, each in turn as the best ones.

        And the squared errors then, and the sums of the blocks' squares.
        """
        outer, core, inner = parts
        outer = _best_factors(self._by_out, core, inner, outer, ridge)
        inner = _best_factors(self._by_in, core.transpose(2, 3), outer, inner, ridge)
        core, found = _best_cores(self._by_in, outer, inner, core, ridge)
        terms = dot(core, _alone(core, outer, inner))
        return (outer, core, inner), (self.power + found - ridge * terms).clamp_min(0), terms


class BlockLayout(Layout):
    """Sums of blocks, the factors of the outputs apart from the rest."""

    outer = 1

    def left(self, parts: Parts) -> Tensor:
        """Return A (batch, out, blocks·r_out)."""
        return parts[0].transpose(1, 2).flatten(2)

    def right(self, parts: Parts) -> Tensor:
        """Return Y (batch, blocks·r_out, n)."""
        _, core, inner = parts
        return torch.einsum("zcpqk,zciq->zcpik", core, inner).flatten(3).flatten(1, 2)

    def seen(self, product: Tensor, parts: Parts, k: int) -> Tensor:
        """Return the adjoint of ``left`` or ``right`` as a map of part k."""
        _, core, inner = parts
        blocks, p, _, taps = core.shape[1:]
        if k == 0:
            return product.reshape(*product.shape[:2], blocks, p).transpose(1, 2)
        apart = product.reshape(-1, blocks, p, inner.shape[2], taps)
        equation, other = ("zcpik,zciq->zcpqk", inner) if k == 1 else ("zcpik,zcpqk->zciq", core)
        return torch.einsum(equation, apart, other)

    def gram(self, parts: Parts, k: int) -> Tensor | None:
        """Return the matrix of the normal equations of the factors of a side, or of the cores."""
        outer, core, inner = parts
        if k == 0:
            return _gram_of_factors(core, inner)
        if k == 2:
            return _gram_of_factors(core.transpose(2, 3), outer)
        return _gram_of_cores(outer, inner) if core[0, ..., 0].numel() <= DIRECT else None

    def columns(self, part: Tensor) -> Tensor:
        """Return factors (batch, blocks, n, r) as (batch, blocks·r, n), cores as (batch, blocks·r·r', K)."""
        return part.mT.flatten(1, 2) if part.dim() == 4 else part.flatten(1, 3)

    def uncolumns(self, columns: Tensor, like: Tensor) -> Tensor:
        """Return factors or cores from columns."""
        return columns.unflatten(1, (like.shape[1], -1)).mT if like.dim() == 4 else columns.view_as(like)

    def along_inputs(self, parts: Parts, matrices: tuple[Tensor, ...]) -> Parts:
        """Return the blocks with a matrix multiplied to the inputs and one to the taps."""
        outer, core, inner = parts
        channels, taps = matrices
        return outer, core @ taps[:, None, None], channels[:, None] @ inner


def deflated(tensor: Tensor, blocks: int, r_out: int, r_in: int) -> Parts:
    """Return blocks for kernels (batch, out, in, K) one after the other, each the HOSVD of what is left by then."""
    rest, found = tensor, []
    for _ in range(blocks):
        outer = leading_eigenvectors(gram(rest.flatten(2)), r_out)
        inner = leading_eigenvectors(gram(rest.transpose(1, 2).flatten(2)), r_in)
        core = torch.einsum("zoik,zop,ziq->zpqk", rest, outer, inner)
        rest = rest - torch.einsum("zpqk,zop,ziq->zoik", core, outer, inner)
        found.append((outer, core, inner))
    outer, core, inner = (torch.stack(same, 1) for same in zip(*found, strict=True))
    return outer, core, inner


def balanced(parts: Parts) -> Parts:
    """Return the same blocks with orthogonal columns in the factors, and in each block all columns and the core alike.

    That is, of equal norms, which gradients and weight decay then treat alike.
    """
    outer, core, inner = parts
    (outer, by_out), (inner, by_in) = torch.linalg.qr(outer), torch.linalg.qr(inner)
    core = torch.einsum("zcap,zcpqk,zcbq->zcabk", by_out, core, by_in)
    size = torch.linalg.vector_norm(core.flatten(2), dim=-1)
    common = torch.where(size > 0, size, torch.ones_like(size)) ** (1 / 3)
    wide = common[..., None, None]
    return outer * wide, core / wide[..., None].square(), inner * wide


def _through(tensor: Tensor, factor: Tensor) -> Tensor:
    """Return kernels (batch, n, K, m) seen through factors (batch, blocks, m, r): (batch, blocks, n, K·r)."""
    batch, rows, taps, _ = tensor.shape
    wide = factor.transpose(1, 2).flatten(2)  # (m, blocks·r)
    seen = (tensor.flatten(1, 2) @ wide).reshape(batch, rows, taps, factor.shape[1], -1)
    return seen.permute(0, 3, 1, 2, 4).flatten(3)


def _overlap(factor: Tensor) -> Tensor:
    """Return the inner products (batch, blocks, r, blocks, r) of the columns of factors (batch, blocks, n, r)."""
    blocks, size = factor.shape[1], factor.shape[3]
    return gram(factor.mT.flatten(1, 2)).reshape(-1, blocks, size, blocks, size)


def _gram_of_factors(core: Tensor, other: Tensor) -> Tensor:
    """Return the matrix (batch, blocks·p, blocks·p) for the factors (batch, blocks, n, p) of one side.

    It is made of the cores (batch, blocks, p, q, K) and the factors of the other side.
    """
    blocks, p, q, taps = core.shape[1:]
    rows = core.transpose(3, 4).reshape(-1, blocks, p * taps, q)
    moved = (rows @ _overlap(other).flatten(3)).reshape(-1, blocks, p, taps, blocks, q)
    moved = moved.permute(0, 4, 1, 2, 3, 5).flatten(4).flatten(2, 3)  # (c', cp, Kq')
    square = (moved @ _columns(core)).transpose(1, 2).flatten(2)
    return (square + square.mT) / 2


def _gram_of_cores(outer: Tensor, inner: Tensor) -> Tensor:
    """Return the matrix (batch, blocks·p·q, blocks·p·q) for all cores at once."""
    pairs = _overlap(outer)[:, :, :, None, :, :, None] * _overlap(inner)[:, :, None, :, :, None, :]
    return pairs.flatten(4).flatten(1, 3)


def _columns(core: Tensor) -> Tensor:
    """Return the cores (batch, blocks, p, q, K) as (batch, blocks, K·q, p)."""
    return core.permute(0, 1, 4, 3, 2).flatten(2, 3)


def _of_each(gram: Tensor, blocks: int) -> Tensor:
    """Return a Gram matrix (batch, blocks·n, blocks·n) with zeros between different blocks."""
    size = gram.shape[-1] // blocks
    apart = gram.reshape(-1, blocks, size, blocks, size)
    same = torch.eye(blocks, dtype=gram.dtype, device=gram.device)
    return (apart * same[:, None, :, None]).reshape(gram.shape)


def _alone(core: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
    """Return the cores between the Gram matrices of their own factors: their product with the cores is ‖block‖²."""
    return torch.einsum("zcap,zcpqk,zcqb->zcabk", outer.mT @ outer, core, inner.mT @ inner)


def _best_factors(tensor: Tensor, core: Tensor, other: Tensor, held: Tensor, ridge: Tensor) -> Tensor:
    """Return the best factors of one side, given the cores and the factors of the other side."""
    seen = _through(tensor, other) @ _columns(core)  # (blocks, n, p)
    square = _gram_of_factors(core, other)
    square = square + each(ridge, square) * _of_each(square, held.shape[1])
    x, _ = solve(square, seen.mT.flatten(1, 2), held.mT.flatten(1, 2))
    return x.reshape(*held.shape[:2], held.shape[3], -1).mT


def _best_cores(by_in: Tensor, outer: Tensor, inner: Tensor, held: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best cores (batch, blocks, p, q, K), and the objective less the power of the kernels."""
    blocks, p, q, taps = held.shape[1:]
    seen = (inner.mT @ _through(by_in, outer)).unflatten(3, (taps, p)).permute(0, 1, 4, 2, 3)
    if blocks * p * q <= DIRECT:
        square = _gram_of_cores(outer, inner)
        square = square + each(ridge, square) * _of_each(square, blocks)
        x, found = solve(square, seen.flatten(1, 3), held.flatten(1, 3))
        return x.view_as(held), found
    by_out = _overlap(outer).permute(0, 3, 1, 2, 4).flatten(2, 3)  # (c', cp, p')
    by_both = _overlap(inner).permute(0, 1, 3, 4, 2).flatten(2, 3)  # (c, c'q', q)

    def product(x: Tensor) -> Tensor:
        moved = (by_out @ x.flatten(3)).reshape(-1, blocks, blocks, p, q, taps)  # (c', c, p, q', K)
        gathered = moved.permute(0, 2, 3, 5, 1, 4).reshape(-1, blocks, p * taps, blocks * q) @ by_both
        all_blocks = gathered.reshape(-1, blocks, p, taps, q).transpose(3, 4)
        return all_blocks + each(ridge, x) * _alone(x, outer, inner)

    return solve_by_steps(product, seen, held)
