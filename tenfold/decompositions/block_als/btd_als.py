"""Sums of Tucker-2 blocks by alternating least squares, from the weight alone or under the data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold.decompositions.base import DECOMPOSITIONS, Factors, FitProblem
from tenfold.decompositions.block_als.base import BlockALS
from tenfold.decompositions.block_als.descent import DIRECT, Blocks, Descent, solve, solve_by_steps
from tenfold.decompositions.block_als.weighted_descent import Layout
from tenfold.formats import Rank
from tenfold.formats.block_term import BlockTerm
from tenfold.tensors import gram, leading_eigenvectors, symmetrize_
from tenfold.tensors.conjugate_gradients import dot, each


@DECOMPOSITIONS.register("btd_als")
@dataclass(frozen=True)
class BTDALS(BlockALS):
    """Alternating least squares for sums of Tucker-2 blocks, on the weight or on the output error, which never grows.

    The factors of the outputs of all blocks together, those of the inputs, and all cores: each is one least-squares
    problem (block term decomposition in rank-(L, M, ·) terms: De Lathauwer & Nion 2008, SIAM J. Matrix Anal. Appl. 30).
    Sweeps are extrapolated. The start takes one block after the other from what those before have left, each by HOSVD;
    small weights have random starts too. With a covariance, inputs and taps are whitened, each by their own; from the
    best blocks in that metric on, sweeps under the real one follow, a few conjugate gradients for each part.

    Settings as of ``BlockALS``; the one block after the other is one of the ``starts``.
    """

    formats = (BlockTerm,)

    def fit(self, problem: FitProblem) -> Factors:
        """Return factors with orthogonal columns, and cores, of equal norms."""
        weight, spec, rank = problem.weight, problem.spec, problem.rank
        if BlockTerm.is_dense(spec, rank):
            return Factors({"core": weight[:, None]})
        modes = weight.shape[2], weight[0, 0, 0].numel()
        result = self.fit_blocks(problem, modes, BlockTermLayout(), lambda kernel: self.terms(kernel.flatten(3), rank))
        outer, core, inner = balanced(result.blocks)
        core = core.reshape(*core.shape[:4], *spec.kernel)
        return Factors({"core": core, "out_factor": outer, "in_factor": inner}, result.sweeps, result.converged)

    def terms(self, tensor: Tensor, rank: Rank) -> Descent:
        """Return the block terms near kernels (batch, out, in, K)."""
        return self.descend_from(
            BlockTermLeastSquares, tensor, deflated(tensor, rank["blocks"], rank["out"], rank["in"])
        )


class BlockTermLeastSquares:
    """A batch of kernels (batch, out, in, K) to approximate by sums of block terms.

    The unknowns are the factors of the outputs (batch, blocks, out, r_out), the cores (batch, blocks, r_out, r_in, K)
    and the factors of the inputs (batch, blocks, in, r_in).
    """

    def __init__(self, tensor: Tensor) -> None:
        self.power = tensor.flatten(1).square().sum(-1)
        self._by_out = tensor.transpose(2, 3).contiguous()  # (batch, out, K, in)
        self._by_in = tensor.permute(0, 2, 3, 1).contiguous()  # (batch, in, K, out)

    def sweep(self, blocks: Blocks, ridge: Tensor) -> tuple[Blocks, Tensor, Tensor]:
        """Return the factors of the outputs, those of the inputs and the cores, each in turn as the best ones.

        And the squared errors then, and the sums of the blocks' squares.
        """
        outer, core, inner = blocks
        outer = _best_factors(self._by_out, core, inner, outer, ridge)
        inner = _best_factors(self._by_in, core.transpose(2, 3), outer, inner, ridge)
        core, lower = _best_cores(self._by_in, outer, inner, core, ridge)
        terms = dot(core, _own_gram(core, outer, inner))
        return (outer, core, inner), (self.power + lower - ridge * terms).clamp_min(0), terms


class BlockTermLayout(Layout):
    """Sums of blocks, the factors of the outputs apart from the rest."""

    outer = 1

    def left(self, blocks: Blocks) -> Tensor:
        """Return A (batch, out, blocks·r_out)."""
        return blocks[0].transpose(1, 2).flatten(2)

    def right(self, blocks: Blocks) -> Tensor:
        """Return Y (batch, blocks·r_out, n)."""
        _, core, inner = blocks
        return torch.einsum("zcpqk,zciq->zcpik", core, inner).flatten(3).flatten(1, 2)

    def adjoint(self, product: Tensor, blocks: Blocks, k: int) -> Tensor:
        """Return the adjoint of ``left`` or ``right`` as a map of block k."""
        _, core, inner = blocks
        terms, p, _, taps = core.shape[1:]
        if k == 0:
            return product.reshape(*product.shape[:2], terms, p).transpose(1, 2)
        apart = product.reshape(-1, terms, p, inner.shape[2], taps)
        equation, other = ("zcpik,zciq->zcpqk", inner) if k == 1 else ("zcpik,zcpqk->zciq", core)
        return torch.einsum(equation, apart, other)

    def gram(self, blocks: Blocks, k: int) -> Tensor | None:
        """Return the matrix of the normal equations of the factors of a side, or of the cores."""
        outer, core, inner = blocks
        if k == 0:
            return _gram_of_factors(core, inner)
        if k == 2:
            return _gram_of_factors(core.transpose(2, 3), outer)
        return _gram_of_cores(outer, inner) if core[0, ..., 0].numel() <= DIRECT else None

    def columns(self, block: Tensor) -> Tensor:
        """Return factors (batch, blocks, n, r) as (batch, blocks·r, n), cores as (batch, blocks·r·r', K)."""
        return block.mT.flatten(1, 2) if block.dim() == 4 else block.flatten(1, 3)

    def uncolumns(self, columns: Tensor, like: Tensor) -> Tensor:
        """Return factors or cores from columns."""
        return columns.unflatten(1, (like.shape[1], -1)).mT if like.dim() == 4 else columns.view_as(like)

    def along_inputs(self, blocks: Blocks, matrices: tuple[Tensor, ...]) -> Blocks:
        """Return the blocks with a matrix multiplied to the inputs and one to the taps."""
        outer, core, inner = blocks
        channels, taps = matrices
        return outer, core @ taps[:, None, None], channels[:, None] @ inner


def deflated(tensor: Tensor, terms: int, r_out: int, r_in: int) -> Blocks:
    """Return block terms for kernels (batch, out, in, K), each the HOSVD of what those before have left."""
    rest, deflation = tensor, []
    for _ in range(terms):
        outer = leading_eigenvectors(gram(rest.flatten(2)), r_out)
        inner = leading_eigenvectors(gram(rest.transpose(1, 2).flatten(2)), r_in)
        core = torch.einsum("zoik,zop,ziq->zpqk", rest, outer, inner)
        rest = rest - torch.einsum("zpqk,zop,ziq->zoik", core, outer, inner)
        deflation.append((outer, core, inner))
    outer, core, inner = (torch.stack(same, 1) for same in zip(*deflation, strict=True))
    return outer, core, inner


def balanced(blocks: Blocks) -> Blocks:
    """Return the same blocks with orthogonal columns in the factors, and in each block all columns and the core alike.

    That is, of equal norms, which gradients and weight decay then treat alike.
    """
    outer, core, inner = blocks
    (outer, by_out), (inner, by_in) = torch.linalg.qr(outer), torch.linalg.qr(inner)
    core = torch.einsum("zcap,zcpqk,zcbq->zcabk", by_out, core, by_in)
    size = torch.linalg.vector_norm(core.flatten(2), dim=-1)
    common = torch.where(size > 0, size, torch.ones_like(size)) ** (1 / 3)
    wide = common[..., None, None]
    return outer * wide, core / wide[..., None].square(), inner * wide


def _project(tensor: Tensor, factor: Tensor) -> Tensor:
    """Return kernels (batch, n, K, m) seen through factors (batch, blocks, m, r): (batch, blocks, n, K·r)."""
    batch, rows, taps, _ = tensor.shape
    wide = factor.transpose(1, 2).flatten(2)  # (m, blocks·r)
    projected = (tensor.flatten(1, 2) @ wide).reshape(batch, rows, taps, factor.shape[1], -1)
    return projected.permute(0, 3, 1, 2, 4).flatten(3)


def _overlap(factor: Tensor) -> Tensor:
    """Return the inner products (batch, blocks, r, blocks, r) of the columns of factors (batch, blocks, n, r)."""
    blocks, size = factor.shape[1], factor.shape[3]
    return gram(factor.mT.flatten(1, 2)).reshape(-1, blocks, size, blocks, size)


def _gram_of_factors(core: Tensor, other: Tensor) -> Tensor:
    """Return the matrix (batch, blocks·p, blocks·p) for the factors (batch, blocks, n, p) of one side.

    Made of the cores (batch, blocks, p, q, K) and the factors of the other side.
    """
    blocks, p, q, taps = core.shape[1:]
    rows = core.transpose(3, 4).reshape(-1, blocks, p * taps, q)
    moved = (rows @ _overlap(other).flatten(3)).reshape(-1, blocks, p, taps, blocks, q)
    moved = moved.permute(0, 4, 1, 2, 3, 5).flatten(4).flatten(2, 3)  # (c', cp, Kq')
    square = (moved @ _columns(core)).transpose(1, 2).flatten(2)
    return symmetrize_(square)


def _gram_of_cores(outer: Tensor, inner: Tensor) -> Tensor:
    """Return the matrix (batch, blocks·p·q, blocks·p·q) for all cores at once."""
    pairs = _overlap(outer)[:, :, :, None, :, :, None] * _overlap(inner)[:, :, None, :, :, None, :]
    return pairs.flatten(4).flatten(1, 3)


def _columns(core: Tensor) -> Tensor:
    """Return the cores (batch, blocks, p, q, K) as (batch, blocks, K·q, p)."""
    return core.permute(0, 1, 4, 3, 2).flatten(2, 3)


def _diagonal_blocks(gram: Tensor, blocks: int) -> Tensor:
    """Return a Gram matrix (batch, blocks·n, blocks·n) with zeros between different blocks."""
    size = gram.shape[-1] // blocks
    apart = gram.reshape(-1, blocks, size, blocks, size)
    same = torch.eye(blocks, dtype=gram.dtype, device=gram.device)
    return (apart * same[:, None, :, None]).reshape(gram.shape)


def _own_gram(core: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
    """Return the cores between the Gram matrices of their own factors: their product with the cores is ‖block‖²."""
    return torch.einsum("zcap,zcpqk,zcqb->zcabk", outer.mT @ outer, core, inner.mT @ inner)


def _best_factors(tensor: Tensor, core: Tensor, other: Tensor, held: Tensor, ridge: Tensor) -> Tensor:
    """Return the best factors of one side, given the cores and the factors of the other side."""
    rhs = _project(tensor, other) @ _columns(core)  # (blocks, n, p)
    square = _gram_of_factors(core, other)
    square = square + each(ridge, square) * _diagonal_blocks(square, held.shape[1])
    x, _ = solve(square, rhs.mT.flatten(1, 2), held.mT.flatten(1, 2))
    return x.reshape(*held.shape[:2], held.shape[3], -1).mT


def _best_cores(by_in: Tensor, outer: Tensor, inner: Tensor, held: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best cores (batch, blocks, p, q, K), and the objective less the power of the kernels."""
    blocks, p, q, taps = held.shape[1:]
    rhs = (inner.mT @ _project(by_in, outer)).unflatten(3, (taps, p)).permute(0, 1, 4, 2, 3)
    if blocks * p * q <= DIRECT:
        square = _gram_of_cores(outer, inner)
        square = square + each(ridge, square) * _diagonal_blocks(square, blocks)
        x, lower = solve(square, rhs.flatten(1, 3), held.flatten(1, 3))
        return x.view_as(held), lower
    # The squares of the blocks are the part of the objective that is within them.
    same = torch.eye(blocks).to(outer)[:, :, None, None]
    weights = 1 + ridge.to(outer)[:, None, None, None, None] * same
    by_out = (_overlap(outer).permute(0, 3, 1, 2, 4) * weights).flatten(2, 3)  # (c', cp, p')
    by_both = _overlap(inner).permute(0, 1, 3, 4, 2).flatten(2, 3)  # (c, c'q', q)

    def product(x: Tensor) -> Tensor:
        """Return the matrix of the normal equations times cores (batch, blocks, p, K, q)."""
        moved = (by_out @ x.flatten(3)).reshape(-1, blocks, blocks, p * taps, q)  # (c', c, pK, q')
        gathered = moved.permute(0, 2, 3, 1, 4).flatten(3)  # (c, pK, c'q')
        return (gathered @ by_both).view_as(x)

    x, lower = solve_by_steps(product, rhs.transpose(3, 4).contiguous(), held.transpose(3, 4).contiguous())
    return x.transpose(3, 4).contiguous(), lower
