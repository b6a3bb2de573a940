"""Tensor trains under the data: alternating least squares on the output error, one core at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from tenfold.decompositions.base import DECOMPOSITIONS, Factors
from tenfold.decompositions.metric import Square, ridged, roots
from tenfold.decompositions.sketch import Sketch
from tenfold.decompositions.weighted import InDoubles
from tenfold.formats import Factorization, Rank
from tenfold.formats.train import TrainFormat
from tenfold.records import LayerSpec, Shape
from tenfold.tensors import trains
from tenfold.tensors.conjugate_gradients import Map, conjugate_gradients, dot
from tenfold.tensors.trains import Cores

# The covariance of one mode is kept this far from singular, as a share of its mean variance.
_MODE_RIDGE = 1e-4

# Squared residuals below this share of the square of what is sought are rounding.
_ROUNDING = 1e-28


@DECOMPOSITIONS.register("tt_als")
@dataclass(frozen=True)
class TTALS(InDoubles):
    """Alternating least squares on the output error, for tensor trains of any kind; the error never grows.

    The inputs are whitened mode by mode, by the covariance that each mode has on its own: that keeps a train a train.
    TT-SVD of the whitened weight is the start. Then core after core, to the right and back, solves its least-squares
    problem tr(Δ C Δᵀ) by a few steps of conjugate gradients in orthonormal frames of the other cores (ALS: Holtz,
    Rohwedder & Schneider 2012, SIAM J. Sci. Comput. 34). Without a covariance this is ALS on the weight.

    Attributes:
        n_iter: sweeps at most, each to the right and back.
        tol: stop when a sweep lowers the error by less than this share of E‖y−ȳ‖².
        cg_steps: steps of conjugate gradients for each core.
        ridge: added to the covariance, as a share of the mean variance.
    """

    n_iter: int = 8
    tol: float = 1e-4
    cg_steps: int = 3

    @classmethod
    def serves(cls, format: type[Factorization]) -> bool:
        """Whether the format is a tensor train, and splits the inputs as they are."""
        return issubclass(format, TrainFormat) and format.splits_inputs

    def fit(
        self,
        weight: Tensor,
        spec: LayerSpec,
        format: type[Factorization],
        rank: Rank,
        covariance: Square | None = None,
    ) -> Factors:
        """Return the cores of the runs, of equal norms."""
        if not issubclass(format, TrainFormat):
            msg = f"tt_als finds tensor trains, not {format.name()}"
            raise TypeError(msg)
        sizes, bonds = format.merged(spec, rank)

        def to_train(kernel: Tensor) -> Tensor:
            return format.to_tensor(kernel, spec).reshape(len(kernel), *sizes)

        def to_weight(tensor: Tensor) -> Tensor:
            return format.from_tensor(tensor.reshape(len(tensor), *format.modes(spec)), spec)

        square = None if covariance is None else self.ridged(weight, covariance)
        frame = None if square is None else Whitening.of(square, format.input_modes(spec))

        def metric(tensor: Tensor) -> Tensor:
            if frame is None or square is None:
                return tensor
            unwhitened = frame.back(to_weight(tensor))
            return to_train(frame.back((unwhitened.flatten(2) @ square).view_as(unwhitened)))

        target = to_train(weight if frame is None else frame.there(weight))
        cores, sweeps, converged = alternate(target, trains.tt_svd(target, bonds, batch_dims=1), metric, self)
        if frame is not None:  # of just the same ranks
            found = to_train(frame.back(to_weight(trains.tt_to_dense(cores))))
            cores = trains.tt_svd(found, bonds, batch_dims=1)
        return Factors(dict(format.named_cores(spec, rank, trains.tt_balance(cores))), sweeps, converged)


@dataclass(frozen=True, eq=False)
class Whitening:
    """What makes the inputs nearly white without mixing the modes that they are split into.

    Attributes:
        modes: of the inputs, in the order of the flattened weight.
        roots: for each mode the square root (batch, n, n) of its own covariance.
        inverses: the inverses of these.
    """

    modes: Shape
    roots: tuple[Tensor, ...]
    inverses: tuple[Tensor, ...]

    @classmethod
    def of(cls, square: Square, modes: Shape) -> Whitening:
        """Return it for a covariance (batch, n, n) with a mean variance of 1, n the product of the modes."""
        pairs = [roots(ridged(marginal(square, modes, k), _MODE_RIDGE)) for k in range(len(modes))]
        return cls(modes, tuple(root for root, _ in pairs), tuple(inverse for _, inverse in pairs))

    def there(self, weight: Tensor) -> Tensor:
        """Return the weights (batch, out, ...) that act on white inputs as these do on the real ones."""
        return self._along(weight, self.roots)

    def back(self, weight: Tensor) -> Tensor:
        """Return the weights for the real inputs; the inverse of ``there``, and its own transpose."""
        return self._along(weight, self.inverses)

    def _along(self, weight: Tensor, matrices: Sequence[Tensor]) -> Tensor:
        batch, out = weight.shape[:2]
        found = weight.reshape(batch, -1, prod(self.modes))
        before, after = out, prod(self.modes)
        for n, matrix in zip(self.modes, matrices, strict=True):
            after //= n
            found = matrix.unsqueeze(1) @ found.reshape(batch, before, n, after)
            before *= n
        return found.reshape(weight.shape)


def marginal(square: Square, modes: Shape, k: int) -> Tensor:
    """Return the mean (batch, n, n) over all other modes of the covariance of mode ``k``."""
    before, n, after = prod(modes[:k]), modes[k], prod(modes[k + 1 :])
    if isinstance(square, Sketch):
        rows = square.rows.unflatten(-1, (before, n, after)).movedim(-2, 1).flatten(2)
        rest = square.rest.unflatten(-1, (before, n, after)).sum((1, 3))
        sums: Tensor = rows @ rows.mT + torch.diag_embed(rest)
        return sums / (before * after)
    blocks = square.unflatten(-1, (before, n, after)).unflatten(1, (before, n, after))
    return torch.einsum("zaibajb->zij", blocks) / (before * after)


def alternate(target: Tensor, start: Cores, metric: Map, config: TTALS) -> tuple[Cores, int, bool]:
    """Return a train nearer to ``target`` (batch, *modes) than ``start``, how many sweeps it took, and if it settled.

    Args:
        target: what to approximate.
        start: cores (batch, r, n, r') of the ranks to keep.
        metric: the symmetric map M of ⟨Δ, M Δ⟩, batch by batch.
        config: sweeps, tolerance and steps.
    """
    if len(start) == 1:
        return start, 1, True
    goal = metric(target)
    total = dot(target, goal)
    total = torch.where(total > 0, total, torch.ones_like(total))
    best, least = start, _error(start, target, metric) / total
    cores, sweeps, converged = list(_right_framed(start)), 0, False
    while not converged and sweeps < config.n_iter:
        for at in range(len(cores) - 1):
            cores[at] = _improved(cores, at, goal, metric, config.cg_steps)
            cores[at], cores[at + 1] = _handed_right(cores[at], cores[at + 1])
        for at in range(len(cores) - 1, 0, -1):
            cores[at] = _improved(cores, at, goal, metric, config.cg_steps)
            cores[at - 1], cores[at] = _handed_left(cores[at - 1], cores[at])
        now = _error(tuple(cores), target, metric) / total
        sweeps += 1
        converged = bool((least - now <= config.tol).all())
        better = now < least
        best = tuple(torch.where(better[:, None, None, None], new, old) for new, old in zip(cores, best, strict=True))
        least = torch.where(better, now, least)
    return best, sweeps, converged


def _improved(cores: Sequence[Tensor], at: int, goal: Tensor, metric: Map, steps: int) -> Tensor:
    """Return the core ``at`` nearer to its best, given all others, whose frames are orthonormal."""
    batch, modes = len(goal), goal.shape[1:]
    left = _before(cores[:at], batch, goal)
    right = _before(tuple(core.transpose(-3, -1) for core in reversed(cores[at + 1 :])), batch, goal)
    right = right.unflatten(1, (*reversed(modes[at + 1 :]), 1)).permute(0, *range(len(modes) - at, 0, -1), -1)
    right = right.reshape(batch, -1, right.shape[-1])

    def seen(tensor: Tensor) -> Tensor:
        """Return what a tensor is in the frames: (batch, r, n, r')."""
        flat = left.mT @ tensor.reshape(batch, left.shape[1], -1)
        core: Tensor = flat.unflatten(-1, (modes[at], -1)) @ right.unsqueeze(1)
        return core

    def shown(core: Tensor) -> Tensor:
        """Return the tensor (batch, *modes) of a core in the frames."""
        flat = (core @ right.mT.unsqueeze(1)).flatten(2)
        tensor: Tensor = left @ flat
        return tensor.reshape(batch, *modes)

    def normal(core: Tensor) -> Tensor:
        return seen(metric(shown(core)))

    enough = _ROUNDING * dot(goal, goal)
    found, _ = conjugate_gradients(normal, seen(goal), cores[at], steps=steps, enough=enough)
    return found


def _before(cores: Sequence[Tensor], batch: int, like: Tensor) -> Tensor:
    """Return what cores (batch, r, n, r') from the end of a train on multiply to: (batch, ∏n, r')."""
    found = like.new_ones(batch, 1, 1)
    for core in cores:
        found = (found @ core.flatten(2)).reshape(batch, -1, core.shape[-1])
    return found


def _handed_right(core: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Return an orthonormal core (r·n, r') and the next one with what that leaves."""
    frame, rest = torch.linalg.qr(core.flatten(1, 2))
    return frame.view_as(core), (rest @ after.flatten(2)).view_as(after)


def _handed_left(before: Tensor, core: Tensor) -> tuple[Tensor, Tensor]:
    """Return the core before with what an orthonormal core (r, n·r') leaves, and that core."""
    frame, rest = torch.linalg.qr(core.flatten(2).mT)
    return before @ rest.mT.unsqueeze(1), frame.mT.reshape(core.shape)


def _right_framed(cores: Cores) -> Cores:
    found = list(cores)
    for at in range(len(found) - 1, 0, -1):
        found[at - 1], found[at] = _handed_left(found[at - 1], found[at])
    return tuple(found)


def _error(cores: Cores, target: Tensor, metric: Map) -> Tensor:
    missed = target - trains.tt_to_dense(cores)
    return dot(missed, metric(missed))
