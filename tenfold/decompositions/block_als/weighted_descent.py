"""Block coordinate descent under a covariance: the same sweeps, on the error of the output.

The weight (out, n) is written as A·Y, where A (out, m) is made of the blocks on the side of the outputs and Y (m, n) of
the others. With M the covariance of the inputs, the error tr((W − AY) M (W − AY)ᵀ) sees the first by way of Y M Yᵀ
alone, and the others by way of AᵀA: M multiplies m rows instead of ``out``. Each block takes some conjugate gradients
from where it is, preconditioned as if the inputs were white, which they nearly are: see ``Whitening``.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tenfold.decompositions.block_als.descent import Blocks, Descent, descend, quadratic_value
from tenfold.decompositions.covariance import Covariance
from tenfold.decompositions.roots import Whitening, preconditioner
from tenfold.records import Shape
from tenfold.tensors.conjugate_gradients import Map, conjugate_gradients, dot

# Blocks on the side of the outputs are cheap to solve for.
_OUTER_STEPS = 8

# The preconditioner is kept this far from singular, as a share of its mean eigenvalue.
_FIRM = 1e-6


class Layout(abc.ABC):
    """How the blocks of a format make up A and Y. All tensors have the batch first."""

    outer: int  # so many of the blocks, the first ones, make up A; all others Y

    @abc.abstractmethod
    def left(self, blocks: Blocks) -> Tensor:
        """Return A (batch, out, m)."""

    @abc.abstractmethod
    def right(self, blocks: Blocks) -> Tensor:
        """Return Y (batch, m, n), the inputs in the order of the flattened weight."""

    @abc.abstractmethod
    def adjoint(self, product: Tensor, blocks: Blocks, k: int) -> Tensor:
        """Return block k of ``product``: the adjoint of ``left`` or ``right`` as a map of that block."""

    @abc.abstractmethod
    def gram(self, blocks: Blocks, k: int) -> Tensor | None:
        """Return the matrix of the normal equations of block k for white inputs; None where it is too large."""

    @abc.abstractmethod
    def columns(self, block: Tensor) -> Tensor:
        """Return a block as columns (batch, r, n) on which ``gram`` acts."""

    @abc.abstractmethod
    def uncolumns(self, columns: Tensor, like: Tensor) -> Tensor:
        """Return a block of the shape of ``like`` from its columns."""

    @abc.abstractmethod
    def along_inputs(self, blocks: Blocks, matrices: tuple[Tensor, ...]) -> Blocks:
        """Return the blocks with a matrix multiplied to each mode of the inputs, in the order of the weight's."""


def descend_weighted(
    weight: Tensor,
    covariance: Covariance,
    modes: Shape,
    layout: Layout,
    fit_white: Callable[[Tensor], Descent],
    *,
    n_iter: int,
    tol: float,
    cg_steps: int,
) -> Descent:
    """Return blocks with a small error tr(Δ C Δᵀ), from a start that is the best for the inputs whitened mode by mode.

    Args:
        weight: (batch, out, in, *kernel).
        covariance: C (batch, n, n), not singular.
        modes: of the inputs, in the order of the flattened weight.
        layout: of the blocks.
        fit_white: returns the blocks of a weight (batch, out, in, *kernel) for white inputs.
        n_iter: sweeps under the covariance at most.
        tol: as in ``descend``.
        cg_steps: for each block that the covariance acts on.
    """
    whitening = Whitening.of(covariance, modes)
    white = whitening.whiten(weight)
    start = fit_white(white)
    problem = WeightedLeastSquares(white.flatten(2), whitening, covariance, layout, cg_steps)
    result = descend(problem, start.blocks, n_iter=n_iter, tol=tol)
    blocks = layout.along_inputs(result.blocks, whitening.inverses)
    return Descent(blocks, result.errors, start.sweeps + result.sweeps, result.converged)


@dataclass(frozen=True, eq=False)
class WeightedLeastSquares:
    """Weights (batch, out, n) in whitened inputs, to approximate by a layout's blocks under the real covariance."""

    white: Tensor
    whitening: Whitening
    covariance: Covariance
    layout: Layout
    cg_steps: int

    @cached_property
    def product(self) -> Tensor:
        """The weight times the covariance."""
        return self.metric(self.white)

    @cached_property
    def power(self) -> Tensor:
        """The squared norms (batch,) under the covariance."""
        return dot(self.product, self.white)

    def metric(self, rows: Tensor) -> Tensor:
        """Return rows (batch, m, n) times the covariance as it is in whitened inputs."""
        return self.whitening.unwhiten(self.whitening.unwhiten(rows) @ self.covariance)

    def sweep(self, blocks: Blocks, ridge: Tensor) -> tuple[Blocks, Tensor, Tensor]:
        """Return each block in turn nearer to its best, the squared errors (batch,) then, and zeros.

        The terms are not minimised: these are few sweeps, from where they are small.
        """
        del ridge
        lower = self.power
        for k in range(len(blocks)):
            block, lower = self._outer(blocks, k) if k < self.layout.outer else self._inner(blocks, k)
            blocks = (*blocks[:k], block, *blocks[k + 1 :])
        return blocks, (self.power + lower).clamp_min(0), torch.zeros_like(lower)

    def _outer(self, blocks: Blocks, k: int) -> tuple[Tensor, Tensor]:
        rows = self.layout.right(blocks)
        weight = rows @ self.metric(rows).mT
        right = self.layout.adjoint(self.product @ rows.mT, blocks, k)

        def normal(x: Tensor) -> Tensor:
            return self.layout.adjoint(self.layout.left((*blocks[:k], x, *blocks[k + 1 :])) @ weight, blocks, k)

        return self._stepped(normal, right, blocks, k, _OUTER_STEPS)

    def _inner(self, blocks: Blocks, k: int) -> tuple[Tensor, Tensor]:
        outer = self.layout.left(blocks)
        weight = outer.mT @ outer
        right = self.layout.adjoint(outer.mT @ self.product, blocks, k)

        def normal(x: Tensor) -> Tensor:
            rows = self.layout.right((*blocks[:k], x, *blocks[k + 1 :]))
            return self.layout.adjoint(weight @ self.metric(rows), blocks, k)

        return self._stepped(normal, right, blocks, k, self.cg_steps)

    def _stepped(self, normal: Map, right: Tensor, blocks: Blocks, k: int, steps: int) -> tuple[Tensor, Tensor]:
        gram, layout = self.layout.gram(blocks, k), self.layout
        lower = None
        if gram is not None:
            lower = preconditioner(gram, _FIRM)

        def precondition(x: Tensor) -> Tensor:
            if lower is None:
                return x
            return layout.uncolumns(torch.cholesky_solve(layout.columns(x), lower), x)

        x, residual = conjugate_gradients(normal, right, blocks[k], steps=steps, precondition=precondition)
        return x, quadratic_value(right - residual, right, x)
