"""Base of the algorithms that sweep over the blocks of a weight, with or without a covariance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold.decompositions.base import CovarianceDecomposition, FitProblem
from tenfold.decompositions.block_als.descent import Blocks, Descent, LeastSquares, descend
from tenfold.decompositions.block_als.weighted_descent import Layout, descend_weighted
from tenfold.decompositions.curves import CurveProblem, ErrorCurve
from tenfold.records import Shape

# Sweeps under the covariance are expensive and their objective is only a sample estimate, so they stop earlier.
_LOOSER = 10

# Tensors with at most so many entries have several starts, swept at once for a while; of larger ones all end alike.
_SMALL = 1 << 12
_SHORT = 20

# Of the fits of a curve; those of weights with so many entries are in float32.
_LARGE = 1 << 16
QUICK = {"n_iter": 20, "data_iter": 3, "starts": 1}


@dataclass(frozen=True)
class BlockALS(CovarianceDecomposition):
    """Alternating least squares over the blocks of a weight, on the weight or on the output error.

    With a covariance the inputs are whitened mode by mode; the best blocks in that metric are the start of sweeps under
    the real one.

    Attributes:
        n_iter: sweeps on the weight at most.
        tol: stop when twice in turn a sweep lowers the root of the objective by less than this share of it.
        penalty: weight of the squares of the terms, times the relative squared error so far.
        starts: of small weights, the one that is no random one among them.
        data_iter: sweeps under the covariance at most; these stop at ten times ``tol``.
        cg_steps: steps of conjugate gradients for each block on the side of the inputs in each of these.
        ridge: added to the covariance, as a share of the mean variance.
    """

    n_iter: int = 200
    tol: float = 1e-4
    penalty: float = 3e-3
    starts: int = 8
    data_iter: int = 20
    cg_steps: int = 3

    slow = True

    def error_curve(self, problem: CurveProblem) -> ErrorCurve:
        """Return the curve between quick fits on lines of ranks."""
        # Under a covariance, which is a square, fits need float64; small ones cost nothing in it.
        fast = problem.moments is None and problem.weight.numel() >= _LARGE
        precision = {"dtype": "auto"} if fast else {}
        return problem.between_fits_on_lines(self.with_settings({**QUICK, **precision}))

    def fit_blocks(
        self, problem: FitProblem, modes: Shape, layout: Layout, fit_white: Callable[[Tensor], Descent]
    ) -> Descent:
        """Return the blocks of a problem's weight.

        Args:
            problem: the weight, and its covariance or None.
            modes: of the inputs, see ``descend_weighted``.
            layout: of the blocks.
            fit_white: returns the blocks of a weight (batch, out, in, *kernel) for white inputs.
        """
        if problem.covariance is None:
            return fit_white(problem.weight)
        return descend_weighted(
            problem.weight,
            self.regularized(problem),
            modes,
            layout,
            fit_white,
            n_iter=self.data_iter,
            tol=_LOOSER * self.tol,
            cg_steps=self.cg_steps,
        )

    def descend_from(self, problem: Callable[[Tensor], LeastSquares], tensor: Tensor, start: Blocks) -> Descent:
        """Return the blocks of tensors (batch, *modes) from a start, of small tensors from the best of several."""
        if self.starts > 1 and tensor[0].numel() <= _SMALL:
            drawn = _random([block.shape[1:] for block in start], self.starts - 1, seed=self.seed, like=tensor)
            starts = tuple(torch.cat([a[:, None], b], 1).flatten(0, 1) for a, b in zip(start, drawn, strict=True))
            repeated = problem(tensor.repeat_interleave(self.starts, 0))
            tried = descend(repeated, starts, n_iter=min(_SHORT, self.n_iter), tol=0, penalty=self.penalty)
            start = _best_of(tried.blocks, tried.errors, self.starts)
        return descend(problem(tensor), start, n_iter=self.n_iter, tol=self.tol, penalty=self.penalty)


def _random(shapes: Sequence[Sequence[int]], starts: int, *, seed: int, like: Tensor) -> Blocks:
    """Return blocks (batch, starts, ...) of normal numbers, the same starts for each of the batch of ``like``."""
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randn(starts, *shape, generator=generator, dtype=torch.float64).to(like) for shape in shapes)
    return tuple(block.expand(len(like), *block.shape) for block in drawn)


def _best_of(blocks: Blocks, errors: Tensor, starts: int) -> Blocks:
    """Return the blocks (batch, ...) of the least error among those of several starts (batch·starts, ...)."""
    least = errors.unflatten(0, (-1, starts)).argmin(1)
    rows = torch.arange(len(least), device=least.device) * starts + least
    return tuple(block[rows] for block in blocks)
