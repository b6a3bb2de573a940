"""Weights that are linear in each of a few parts, under the data: the same sweeps, on the error of the output.

The weight (out, n) is written as A·Y, where A (out, m) is made of the parts on the side of the outputs and Y (m, n) of
the others. With M the covariance of the inputs, the error tr((W − AY) M (W − AY)ᵀ) sees the first by way of Y M Yᵀ
alone, and the others by way of AᵀA: M multiplies m rows instead of ``out``. Each part takes some conjugate gradients
from where it is, preconditioned as if the inputs were white, which they nearly are: see ``tt_als.Whitening``.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tenfold.decompositions.metric import Square
from tenfold.decompositions.parts import Found, Parts, descend, raised, value
from tenfold.decompositions.tt_als import Whitening
from tenfold.records import Shape
from tenfold.tensors.conjugate_gradients import Map, conjugate_gradients, dot

# Parts on the side of the outputs are cheap to solve for.
_OUTER_STEPS = 8

# The preconditioner is kept this far from singular, as a share of its mean eigenvalue.
_FIRM = 1e-6


class Layout(abc.ABC):
    """How the parts of a format make up A and Y. All tensors have the batch first."""

    outer: int  # so many of the parts, the first ones, make up A; all others Y

    @abc.abstractmethod
    def left(self, parts: Parts) -> Tensor:
        """Return A (batch, out, m)."""

    @abc.abstractmethod
    def right(self, parts: Parts) -> Tensor:
        """Return Y (batch, m, n), the inputs in the order of the flattened weight."""

    @abc.abstractmethod
    def seen(self, product: Tensor, parts: Parts, k: int) -> Tensor:
        """Return the part k of ``product``: the adjoint of ``left`` or ``right`` as a map of that part."""

    @abc.abstractmethod
    def gram(self, parts: Parts, k: int) -> Tensor | None:
        """Return the matrix of the normal equations of part k for white inputs; None where it is too large."""

    @abc.abstractmethod
    def columns(self, part: Tensor) -> Tensor:
        """Return a part as columns (batch, r, n) on which ``gram`` acts."""

    @abc.abstractmethod
    def uncolumns(self, columns: Tensor, like: Tensor) -> Tensor:
        """Return a part of the shape of ``like`` from its columns."""

    @abc.abstractmethod
    def along_inputs(self, parts: Parts, matrices: tuple[Tensor, ...]) -> Parts:
        """Return the parts with a matrix multiplied to each mode of the inputs, in the order of the weight's."""


def descend_under(
    weight: Tensor,
    square: Square,
    modes: Shape,
    layout: Layout,
    begin: Callable[[Tensor], Found],
    *,
    n_iter: int,
    tol: float,
    cg_steps: int,
) -> Found:
    """Return parts with a small error tr(Δ C Δᵀ), from a start that is the best for the inputs whitened mode by mode.

    Args:
        weight: (batch, out, in, *kernel).
        square: the covariance C (batch, n, n), not singular.
        modes: of the inputs, in the order of the flattened weight.
        layout: of the parts.
        begin: returns the parts that meet a weight (batch, out, in, *kernel) for white inputs.
        n_iter: sweeps under the covariance at most.
        tol: as in ``descend``.
        cg_steps: for each part that the covariance acts on.
    """
    frame = Whitening.of(square, modes)
    white = frame.there(weight)
    begun = begin(white)
    problem = Under(white.flatten(2), frame, square, layout, cg_steps)
    found = descend(problem, begun.parts, n_iter=n_iter, tol=tol)
    return Found(
        layout.along_inputs(found.parts, frame.inverses), found.errors, begun.sweeps + found.sweeps, found.converged
    )


@dataclass(frozen=True, eq=False)
class Under:
    """Weights (batch, out, n) in whitened inputs, to be met by the parts of a layout under the real covariance."""

    white: Tensor
    frame: Whitening
    square: Square
    layout: Layout
    cg_steps: int

    @cached_property
    def goal(self) -> Tensor:
        """The weight times the covariance."""
        return self.metric(self.white)

    @cached_property
    def power(self) -> Tensor:
        """The squared norms (batch,) under the covariance."""
        return dot(self.goal, self.white)

    def metric(self, rows: Tensor) -> Tensor:
        """Return rows (batch, m, n) times the covariance as it is in whitened inputs."""
        return self.frame.back(self.frame.back(rows) @ self.square)

    def sweep(self, parts: Parts, ridge: Tensor) -> tuple[Parts, Tensor, Tensor]:
        """Return each part in turn nearer to its best, the squared errors (batch,) then, and zeros.

        The terms are not minimised: these are few sweeps, from where they are small.
        """
        del ridge
        found = self.power
        for k in range(len(parts)):
            part, found = self._outer(parts, k) if k < self.layout.outer else self._inner(parts, k)
            parts = (*parts[:k], part, *parts[k + 1 :])
        return parts, (self.power + found).clamp_min(0), torch.zeros_like(found)

    def _outer(self, parts: Parts, k: int) -> tuple[Tensor, Tensor]:
        rows = self.layout.right(parts)
        weight = rows @ self.metric(rows).mT
        right = self.layout.seen(self.goal @ rows.mT, parts, k)

        def normal(x: Tensor) -> Tensor:
            return self.layout.seen(self.layout.left((*parts[:k], x, *parts[k + 1 :])) @ weight, parts, k)

        return self._stepped(normal, right, parts, k, _OUTER_STEPS)

    def _inner(self, parts: Parts, k: int) -> tuple[Tensor, Tensor]:
        made = self.layout.left(parts)
        weight = made.mT @ made
        right = self.layout.seen(made.mT @ self.goal, parts, k)

        def normal(x: Tensor) -> Tensor:
            rows = self.layout.right((*parts[:k], x, *parts[k + 1 :]))
            return self.layout.seen(weight @ self.metric(rows), parts, k)

        return self._stepped(normal, right, parts, k, self.cg_steps)

    def _stepped(self, normal: Map, right: Tensor, parts: Parts, k: int, steps: int) -> tuple[Tensor, Tensor]:
        gram, layout = self.layout.gram(parts, k), self.layout
        lower = None
        if gram is not None:
            level = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
            lower = torch.linalg.cholesky(raised(gram, torch.where(level > 0, level * _FIRM, 1.0)))

        def precondition(x: Tensor) -> Tensor:
            if lower is None:
                return x
            return layout.uncolumns(torch.cholesky_solve(layout.columns(x), lower), x)

        x, residual = conjugate_gradients(normal, right, parts[k], steps=steps, precondition=precondition)
        return x, value(right - residual, right, x)
