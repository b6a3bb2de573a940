"""All that a layer could become: every admissible format at every rank of a grid, with exact costs, fast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tenfold.errors import RankError
from tenfold.formats import FORMATS, Rank
from tenfold.ranks.base import RankProblem
from tenfold.records import Cost

Ranks = NDArray[np.int64]
Numbers = NDArray[np.int64]
Damage = Callable[[Ranks], NDArray[np.float64]]

# Small layers have few ranks to choose from, so that their grid is finer: (up to this full rank, step).
_STEPS = ((16, 1), (32, 2), (64, 4))
_HARDWARE_STEP = 8


@dataclass(frozen=True)
class Candidate:
    """One way to factorize a layer, and what the layer would cost then."""

    format: str
    rank: Rank
    cost: Cost


@dataclass(frozen=True, eq=False)
class Grid:
    """The ranks of one format that make a layer cheaper, as columns of numbers.

    Attributes:
        format: name of the format.
        names: of the ranks.
        ranks: (n, names), in ascending order.
        params: (n,) parameters of the layer at each of them.
        macs: (n,) multiply-accumulates.
    """

    format: str
    names: tuple[str, ...]
    ranks: Ranks
    params: Numbers
    macs: Numbers

    def __len__(self) -> int:
        return len(self.ranks)

    def candidate(self, index: int) -> Candidate:
        """Return one of the ranks with its cost."""
        rank = dict(zip(self.names, self.ranks[index].tolist(), strict=True))
        return Candidate(self.format, rank, Cost(params=int(self.params[index]), macs=int(self.macs[index])))

    def costs(self, names: Sequence[Literal["params", "macs"]]) -> NDArray[np.float64]:
        """Return the costs (n, budgets) in the order of the ``names``, as a knapsack takes them."""
        return np.stack([getattr(self, name) for name in names], axis=1).astype(np.float64)


def grids(problem: RankProblem, *, step: int | None = None) -> tuple[Grid, ...]:
    """Return for each admissible format the ranks on a grid at which the layer costs less than it does now.

    The grid of a rank has the multiples of ``step`` and full rank; formats with two ranks get all pairs, and where one
    of these is full, its factor is left out (partial Tucker). Formats with more ranks say which are worth a try.

    Args:
        problem: the layer.
        step: between the ranks; None for 8, which suits the hardware, but 4, 2 or 1 where full rank is at most 64, 32
            or 16.

    Raises:
        RankError: a step that is not a positive whole number.
    """
    if step is not None and (isinstance(step, bool) or not isinstance(step, int) or step < 1):
        msg = f"step={step!r} must be a whole number from 1 on: ranks on the grid are its multiples"
        raise RankError(msg)
    return tuple(_grid(problem, format, step) for format in problem.formats)


def candidates(problem: RankProblem, *, step: int | None = None) -> tuple[Candidate, ...]:
    """Return all formats and ranks of ``grids`` one by one: by format, the preferred first, then by ascending rank.

    Raises:
        RankError: a step that is not a positive whole number.
    """
    return tuple(grid.candidate(i) for grid in grids(problem, step=step) for i in range(len(grid)))


def tail_damage(problem: RankProblem, format: str) -> Damage:
    """Return a function from ranks (n, names) to an estimate (n,) of the relative squared error ‖W − Ŵ‖²/‖W‖².

    It is the share of the squares that the unfoldings' spectra lose, at most 1: exact for formats with one unfolding
    (Eckart & Young 1936), an upper bound for Tucker-2, at most twice the optimum (De Lathauwer et al. 2000). Of formats
    whose error no spectrum bounds (CP) it is that of quick fits.
    """
    kind = FORMATS.get(format)
    if not kind.svd_bounds_error:
        return problem.fitted(format)
    spectra = problem.spectra(format)
    tails = [_tail(spectra[name].double().numpy()) for name in kind.rank_names]

    def damage(ranks: Ranks) -> NDArray[np.float64]:
        lost = [tail[np.minimum(ranks[:, k], len(tail) - 1)] for k, tail in enumerate(tails)]
        return np.asarray(np.minimum(np.sum(lost, axis=0), 1.0))

    return damage


def _tail(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the share of the squares beyond each rank, from 0 on; summed from the far end: small ones are exact."""
    scale = values.max(initial=0.0)
    if scale == 0:
        return np.zeros(len(values) + 1)
    squares = (values / scale) ** 2
    tails = np.append(squares[::-1].cumsum()[::-1], 0.0)
    return np.asarray(tails / tails[0])


def _grid(problem: RankProblem, format: str, step: int | None) -> Grid:
    kind = FORMATS.get(format)
    names = kind.rank_names
    ranks = kind.rank_grid(problem.spec, lambda full: _axis(full, step))
    params, macs = problem.costs_at(format, ranks)
    now = problem.cost
    counted = macs if now.macs else np.zeros_like(macs)  # a lookup is judged by its parameters
    cheaper = (params <= now.params) & (counted <= now.macs) & ((params < now.params) | (counted < now.macs))
    return Grid(format, names, ranks[cheaper], params[cheaper], macs[cheaper])


def _axis(full: int, step: int | None) -> list[int]:
    stride = step or _step(full)
    return [*range(stride, full, stride), full]


def _step(full: int) -> int:
    return next((step for most, step in _STEPS if full <= most), _HARDWARE_STEP)
