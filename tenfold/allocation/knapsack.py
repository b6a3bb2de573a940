"""The multiple-choice knapsack: one option for each layer, least distortion within all limits, with a certificate."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tenfold.allocation.pareto import columns_of, pareto
from tenfold.errors import BudgetError

Array = NDArray[np.float64]
Picks = NDArray[np.intp]

_ROUND = 1e-12  # what sums of costs may exceed a limit by, as a share of it: rounding of the sums
_PROVEN = 5e-5  # a gap that would be shown as none
_SOLVER_LIMIT = 1e4  # limits as the solver sees them, whose tolerance is an absolute 1e-6


@dataclass(frozen=True)
class Allocation:
    """One option for each layer, and how far from the optimum it can be at most.

    Attributes:
        choice: index of the option, by layer.
        distortion: sum of the distortions.
        cost: sum of the costs, by budget; each within its limit.
        bound: no allocation within the limits has less distortion than this.
        gap: (distortion − bound)/|distortion|, at least 0.
        method: what found it: ``lagrangian`` (and greedy filling) or ``milp`` (branch and bound).
    """

    choice: tuple[int, ...]
    distortion: float
    cost: tuple[float, ...]
    bound: float
    gap: float
    method: Literal["lagrangian", "milp"]

    @property
    def proof(self) -> str:
        """What a plan says of the options that were chosen."""
        if self.gap < _PROVEN:
            return "best for the whole model, proven"
        return f"best for the whole model, proven to {self.gap:.2%} of the distortion"

    @property
    def stays(self) -> str:
        """What a plan says of a layer whose option is to stay as it is."""
        return stays(self.proof)


def stays(proof: str) -> str:
    """Return what a plan says of a layer that stays as it is in an allocation with this proof."""
    return f"{proof}: what it would save elsewhere costs less distortion"


def solve(
    distortions: Sequence[ArrayLike],
    costs: Sequence[ArrayLike],
    limits: ArrayLike,
    *,
    gap: float = 1e-3,
    time_limit: float = 10.0,
    names: Sequence[str] | None = None,
) -> Allocation:
    """Return the options with the least total distortion whose total costs stay within the limits.

    Options that another one beats on all counts are dropped first. The Lagrangian dual then gives a lower bound (that
    of the linear relaxation: Sinha & Zoltners 1979) and, filled up greedily, an allocation. It reaches the convex hull
    of the options only: where the two are further apart than ``gap``, branch and bound (HiGHS) decides among those that
    the bound has not ruled out, and the better of both is returned. Ties go to the cheaper, then the earlier.

    Args:
        distortions: for each layer the distortion of each option (n,): any finite numbers, comparable between layers.
        costs: for each layer the costs of each option (n, budgets), or (n,) where there is one budget.
        limits: what the costs may add up to (budgets,).
        gap: relative gap from which on the allocation is good enough.
        time_limit: seconds that branch and bound may take; the gap returned tells what it reached.
        names: of the budgets, for messages.

    Raises:
        BudgetError: no allocation is within the limits; or shapes that do not fit, or numbers that are not finite.

    Example:
        >>> best = solve([[3.0, 1.0, 0.0], [2.0, 0.0]], [[1, 2, 4], [1, 3]], [5])
        >>> best.choice, best.distortion
        ((1, 1), 1.0)
    """
    wanted, total, limit = _checked(distortions, costs, limits)
    names = list(names) if names is not None else [f"budget {k + 1}" for k in range(len(limit))]
    options = _Options.of(wanted, total, limit, names)
    if not wanted:
        return Allocation((), 0.0, (0.0,) * len(limit), 0.0, 0.0, "lagrangian")
    prices, bound = options.prices(names)
    picks = options.improved(options.repaired(options.cheapest(prices)), prices)
    method: Literal["lagrangian", "milp"] = "lagrangian"
    if picks is None or _gap(options.distortion(picks), bound) > gap:
        found, proven = options.branched(picks, prices, bound, gap / 2, time_limit)
        bound = max(bound, proven)
        found = options.improved(found, prices)
        if found is not None and (picks is None or options.distortion(found) < options.distortion(picks)):
            picks, method = found, "milp"
    if picks is None:
        stuck = f"no choice of options was found within {_listed(names, limit)}: raise the budgets or the time limit"
        raise BudgetError(_not_together(names) if bound == np.inf else stuck)
    choice = tuple(int(i) for i in options.index[options.rows, picks])
    distortion = float(sum(w[i] for w, i in zip(wanted, choice, strict=True)))
    cost = tuple(float(v) for v in np.sum([c[i] for c, i in zip(total, choice, strict=True)], axis=0))
    return Allocation(choice, distortion, cost, min(bound, distortion), _gap(distortion, bound), method)


def _checked(
    distortions: Sequence[ArrayLike], costs: Sequence[ArrayLike], limits: ArrayLike
) -> tuple[list[Array], list[Array], Array]:
    limit = np.atleast_1d(np.asarray(limits, dtype=np.float64))
    wanted, total = [np.asarray(d, dtype=np.float64) for d in distortions], [columns_of(c) for c in costs]
    shapes = [(w.shape, t.shape) for w, t in zip(wanted, total, strict=False)]
    if len(wanted) != len(total) or not all(a == (b[0],) and b == (*a, len(limit)) and a[0] > 0 for a, b in shapes):
        msg = (
            f"each of {len(wanted)} layers needs distortions (n,) and costs (n, {len(limit)}), n > 0, not {shapes[:4]}"
        )
        raise BudgetError(msg)
    if not all(np.isfinite(a).all() for a in (*wanted, *total, limit)):
        msg = "distortions, costs and limits must be finite numbers"
        raise BudgetError(msg)
    return wanted, total, limit


def _gap(distortion: float, bound: float) -> float:
    missing = max(distortion - bound, 0.0)
    return missing / abs(distortion) if missing > 0 and distortion != 0 else missing


def _listed(names: Sequence[str], numbers: Array) -> str:
    return ", ".join(f"{name} {number:,.6g}" for name, number in zip(names, numbers, strict=True))


@dataclass(frozen=True, eq=False)
class _Options:
    """What is worth choosing from, padded to one table; costs above the least, as shares of what the limits leave."""

    distortions: Array  # (layers, options), infinite where a layer has fewer
    costs: Array  # (layers, options, budgets)
    index: Picks  # (layers, options) the option's number as it was given

    @classmethod
    def of(cls, distortions: list[Array], costs: list[Array], limits: Array, names: Sequence[str]) -> _Options:
        """Return the options that are on their layer's Pareto front and fit at all; or say what is out of reach."""
        least = [c.min(0) for c in costs]
        slack = limits - np.sum(least, axis=0) if least else limits
        tight = _ROUND * np.abs(limits)
        if (slack < -tight).any():
            msg = (
                f"the budget cannot be met: asked for {_listed(names, limits)}, lowest {_listed(names, limits - slack)}"
            )
            raise BudgetError(msg)
        unit = np.where(slack > tight, slack, 1.0)  # with nothing to spare, only what costs nothing more will do
        allowed = np.where(slack > tight, 1.0, tight)
        fronts = []
        for d, c, low in zip(distortions, costs, least, strict=True):
            over = (c - low) / unit
            (fits,) = np.nonzero((over <= allowed + _ROUND).all(1))
            front = fits[pareto(d[fits], over[fits])]
            fronts.append((d[front], np.where(slack > tight, over[front], 0.0), front))
        width = max((len(f) for _, _, f in fronts), default=0)
        table = cls(
            np.full((len(fronts), width), np.inf),
            np.zeros((len(fronts), width, len(limits))),
            np.zeros((len(fronts), width), dtype=np.intp),
        )
        for row, (d, over, front) in enumerate(fronts):
            size = len(front)
            table.distortions[row, :size], table.costs[row, :size], table.index[row, :size] = d, over, front
        if any(len(f) == 0 for _, _, f in fronts):
            raise BudgetError(_not_together(names))
        return table

    @property
    def rows(self) -> Picks:
        return np.arange(len(self.distortions))

    @property
    def real(self) -> NDArray[np.bool_]:
        return np.isfinite(self.distortions)

    def distortion(self, picks: Picks) -> float:
        return float(self.distortions[self.rows, picks].sum())

    def cost(self, picks: Picks) -> Array:
        return self.costs[self.rows, picks].sum(0)  # type: ignore[no-any-return]

    def cheapest(self, prices: Array) -> Picks:
        """Return for each layer the option with the least distortion plus price."""
        return np.asarray((self.distortions + self.costs @ prices).argmin(1))

    def dual(self, prices: Array) -> float:
        """Return the lower bound that these prices (≥ 0) give."""
        return float((self.distortions + self.costs @ prices).min(1, initial=np.inf).sum() - prices.sum())

    def prices(self, names: Sequence[str]) -> tuple[Array, float]:
        """Return what a limit's worth of each budget is worth in distortion, and the lower bound that follows."""
        free = np.zeros(self.costs.shape[2])
        if (self.cost(self.cheapest(free)) <= 1 + _ROUND).all():
            return free, self.dual(free)
        prices = self._one_price() if len(free) == 1 else self._linear_prices(names)
        return prices, self.dual(prices)

    def _one_price(self) -> Array:
        """Follow the dual's tangents to its peak: it is concave and piecewise linear, so this ends, exactly."""
        over, under = self.cheapest(np.zeros(1)), self.costs[:, :, 0].argmin(1)
        price = 0.0
        for _ in range(200):
            apart = float(self.cost(over)[0] - self.cost(under)[0])
            price = max((self.distortion(under) - self.distortion(over)) / apart, 0.0)
            picks = self.cheapest(np.array([price]))
            value, line = (self.distortion(p) + price * float(self.cost(p)[0]) for p in (picks, under))
            if value >= line - 1e-14 * (abs(line) + price):
                break
            if self.cost(picks)[0] <= 1 + _ROUND:
                under = picks
            else:
                over = picks
        return np.array([price])

    def _linear_prices(self, names: Sequence[str]) -> Array:
        """Return the dual values of the linear relaxation."""
        from scipy.optimize import linprog

        distortions, capacity, one_each = self._program(self.real)
        unit = float(np.abs(distortions).max()) or 1.0
        found = linprog(distortions / unit, capacity, np.ones(capacity.shape[0]), one_each, np.ones(one_each.shape[0]))
        if found.status == 2:
            raise BudgetError(_not_together(names))
        return np.maximum(-np.asarray(found.ineqlin.marginals) * unit, 0)

    def _program(self, chosen: NDArray[np.bool_]) -> tuple[Array, Any, Any]:
        """Return distortions (variables,), costs (budgets, variables), and sums (layers, variables), sparse."""
        from scipy import sparse

        layer, _ = np.nonzero(chosen)
        count = len(layer)
        sums = sparse.csr_array((np.ones(count), (layer, np.arange(count))), shape=(len(self.distortions), count))
        return self.distortions[chosen], sparse.csr_array(self.costs[chosen].T), sums

    def repaired(self, picks: Picks) -> Picks | None:
        """Return picks within the limits, by steps that cost least distortion for what they save; None if stuck."""
        picks = picks.copy()
        for _ in range(self.distortions.size + 1):
            excess = np.maximum(self.cost(picks) - 1, 0)
            excess[excess <= _ROUND] = 0
            if not excess.any():
                return picks
            change = self.costs - self.costs[self.rows, picks][:, None]
            after = np.maximum(self.cost(picks) + change - 1, 0).sum(2)
            saved = excess.sum() - after
            harm = self.distortions - self.distortions[self.rows, picks][:, None]
            rate = np.where((saved > _ROUND) & self.real, harm / np.maximum(saved, _ROUND), np.inf)
            best = int(rate.argmin())
            if not np.isfinite(rate.flat[best]):
                return None
            picks[best // rate.shape[1]] = best % rate.shape[1]
        return None

    def improved(self, picks: Picks | None, prices: Array) -> Picks | None:
        """Return picks with what is left of the budgets spent, best distortion per price first."""
        if picks is None:
            return picks
        picks, weights = picks.copy(), prices + 1e-9 * (prices.sum() or 1.0)
        for _ in range(self.distortions.size + 1):
            gain = self.distortions[self.rows, picks][:, None] - self.distortions
            change = self.costs - self.costs[self.rows, picks][:, None]
            fits = (self.cost(picks) + change <= 1 + _ROUND).all(2)
            with np.errstate(over="ignore"):  # what costs nothing comes first, however little it gains
                rate = np.where(fits & (gain > 0), gain / np.maximum(change @ weights, 1e-300), 0)
            best = int(rate.argmax())
            if rate.flat[best] <= 0:
                break
            picks[best // rate.shape[1]] = best % rate.shape[1]
        return picks

    def branched(
        self, picks: Picks | None, prices: Array, bound: float, gap: float, seconds: float
    ) -> tuple[Picks | None, float]:
        """Return the best picks that HiGHS finds, None if none, and a lower bound, −∞ if none.

        An option whose reduced cost exceeds the distance between the known distortion and the bound is in no better
        allocation.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp

        reduced = self.distortions + self.costs @ prices
        reduced = reduced - reduced.min(1)[:, None]
        known = np.inf if picks is None else self.distortion(picks)
        distance = known - bound
        chosen = self.real & (reduced <= distance * (1 + 1e-9))
        distortions, capacity, one_each = self._program(chosen)
        # The gap that the solver stops at is relative to the distortion: its scale must be that of the real one.
        unit = 1000 / (abs(known if picks is not None else bound) or float(np.abs(distortions).max()) or 1.0)
        rules = [LinearConstraint(one_each, 1, 1), LinearConstraint(capacity * _SOLVER_LIMIT, -np.inf, _SOLVER_LIMIT)]
        with _quiet():
            found = milp(
                distortions * unit,
                integrality=np.ones(len(distortions), dtype=np.int64),
                bounds=Bounds(0, 1),
                constraints=rules,
                options={"mip_rel_gap": gap, "time_limit": seconds},
            )
        # What was ruled out is not below the known distortion, so the true optimum is at least the lesser of both.
        proven = -np.inf if found.mip_dual_bound is None else min(found.mip_dual_bound / unit, known)
        if found.status == 2:  # proven infeasible
            proven = known
        if found.x is None:
            return None, proven
        values = np.zeros(self.distortions.shape)
        values[chosen] = found.x
        return self.repaired(values.argmax(1)), proven


# The descriptor belongs to the whole process: a thread that took over while another has it would keep the nowhere.
_STDOUT = threading.Lock()


@contextmanager
def _quiet() -> Iterator[None]:
    """Send what HiGHS itself writes to stdout nowhere: some of its lines heed no option, and stdout is for results.

    One thread at a time, for as long as it solves.
    """
    with _STDOUT:
        try:
            own = os.dup(1)
        except OSError:  # there is no stdout
            yield
            return
        try:
            with open(os.devnull, "wb") as nowhere:  # noqa: PTH123 - a device
                os.dup2(nowhere.fileno(), 1)
            yield
        finally:
            os.dup2(own, 1)
            os.close(own)


def _not_together(names: Sequence[str]) -> str:
    return f"each of the budgets {', '.join(names)} can be met alone, but not all of them together: raise one of them"
