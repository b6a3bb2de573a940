"""Allocations respect every limit, and their certificate holds against enumeration and dynamic programming."""

from __future__ import annotations

import os
import threading
from typing import Any

import numpy as np
import pytest
import scipy.optimize

from tenfold.allocation.knapsack import _quiet, pareto, solve
from tenfold.errors import BudgetError
from tests.allocation.oracles import brute_force, dp_alloc, lagrange_alloc

Instance = tuple[list[np.ndarray], list[np.ndarray], np.ndarray]


def instance(seed: int, layers: int, options: int, budgets: int, share: float, *, convex: bool = False) -> Instance:
    """Distortions that fall and costs that rise along each layer; limits at a share of the way from least to most."""
    g = np.random.default_rng(seed)
    distortions, costs = [], []
    for _ in range(layers):
        n = int(g.integers(1, options + 1))
        steps = g.exponential(size=n)
        if convex:
            steps = np.sort(steps)[::-1]
        d = steps[::-1].cumsum()[::-1] - steps.min() * g.random()
        c = g.integers(1, 40, size=(n, budgets)).cumsum(0).astype(float) * 10.0 ** np.arange(budgets) ** 3
        distortions.append(d * g.uniform(0.1, 10))
        costs.append(c)
    least, most = (sum(f(c, 0) for c in costs) for f in (np.min, np.max))
    return distortions, costs, least + share * (most - least)


def check(found: object, distortions: list[np.ndarray], costs: list[np.ndarray], limits: np.ndarray) -> None:
    """What is returned is consistent with itself and within the limits."""
    spent = sum(c[i] for c, i in zip(costs, found.choice, strict=True))
    np.testing.assert_allclose(found.cost, spent)
    assert (spent <= limits * (1 + 1e-9)).all()
    assert found.distortion == pytest.approx(sum(d[i] for d, i in zip(distortions, found.choice, strict=True)))
    assert found.bound <= found.distortion
    assert found.gap == pytest.approx(
        (found.distortion - found.bound) / abs(found.distortion) if found.distortion else 0, abs=1e-12
    )


@pytest.mark.parametrize("budgets", [1, 2, 3])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.8, 1.0])
def test_optimum_is_that_of_enumeration(budgets: int, share: float) -> None:
    for seed in range(12):
        distortions, costs, limits = instance(seed, 5, 6, budgets, share)
        best = brute_force(distortions, costs, limits)
        found = solve(distortions, costs, limits, gap=0)
        check(found, distortions, costs, limits)
        assert found.distortion == pytest.approx(best, rel=1e-9, abs=1e-12)
        assert found.bound <= best + 1e-9 * abs(best)
        assert found.gap <= 1e-6


@pytest.mark.parametrize("budgets", [1, 2, 3])
def test_bound_holds_and_gap_is_as_asked(budgets: int) -> None:
    methods = set()
    for seed in range(25):
        distortions, costs, limits = instance(100 + seed, 6, 5, budgets, 0.4)
        best = brute_force(distortions, costs, limits)
        found = solve(distortions, costs, limits, gap=0.02)
        check(found, distortions, costs, limits)
        assert found.bound <= best + 1e-9 * abs(best)
        assert found.distortion <= best * (1 + found.gap) + 1e-9
        assert found.gap <= 0.02
        methods.add(found.method)
    assert methods == {"lagrangian", "milp"}  # both ways are exercised


def test_staircase_whose_hull_leaves_out_the_best() -> None:
    # Each layer: nothing, a middle option above the line from end to end, everything. No price ever picks the middle.
    distortions, costs = [[10.0, 6.0, 0.0]] * 3, [[0, 5, 10]] * 3
    found = solve(distortions, costs, [15], gap=0)
    assert found.distortion == pytest.approx(16)  # one whole, one middle
    assert sorted(found.choice) == [0, 1, 2]
    # The middles alone: greedy on the ratio would take the cheap and useless step first.
    found = solve([[10.0, 9.0, 0.0], [10.0, 4.9]], [[0, 1, 10], [0, 5]], [10], gap=0)
    assert found.choice == (2, 0)


@pytest.mark.parametrize("seed", range(10))
def test_at_least_as_good_as_lagrange_and_dynamic_programming(seed: int) -> None:
    g = np.random.default_rng(seed)
    costs = [np.cumsum(g.uniform(0.5, 2, 32)) * g.uniform(1, 20) for _ in range(12)]
    distortions = [
        g.uniform(0.2, 5) * np.exp(-g.uniform(0.02, 0.2) * np.arange(32)) + 0.02 * g.random() for _ in range(12)
    ]
    distortions = [np.minimum.accumulate(d + 0.02 * g.standard_normal(32)) for d in distortions]
    limit = 0.45 * sum(c[-1] for c in costs)
    found = solve(distortions, costs, [limit])
    check(found, distortions, [c[:, None] for c in costs], np.array([limit]))
    totals = {}
    for name, picks in (
        ("lagrange", lagrange_alloc([-d for d in distortions], costs, limit)),
        ("dp", dp_alloc(distortions, costs, limit, bins=20_000)),
    ):
        assert sum(c[i] for c, i in zip(costs, picks, strict=True)) <= limit * (1 + 1e-9)
        totals[name] = sum(d[i] for d, i in zip(distortions, picks, strict=True))
    least = min(totals.values())
    assert totals["lagrange"] <= totals["dp"] + 1e-3 * sum(d[0] for d in distortions)
    assert found.bound <= least + 1e-9
    assert found.distortion <= least + 1e-3 * abs(least)
    assert found.gap <= 1e-3


@pytest.mark.parametrize("budgets", [1, 2])
def test_many_layers_and_options_are_certified(budgets: int) -> None:
    distortions, costs, limits = instance(0, 200, 32, budgets, 0.4)
    found = solve(distortions, costs, limits)
    check(found, distortions, costs, limits)
    assert found.gap <= 1e-3
    if budgets == 1:  # a whole network's budget is used up but for less than the smallest step
        assert found.cost[0] >= 0.99 * limits[0]


def test_large_and_small_units_do_not_matter() -> None:
    distortions, costs, limits = instance(3, 6, 6, 2, 0.4)
    one = solve(distortions, costs, limits, gap=0)
    other = solve([d * 1e-9 for d in distortions], [c * [1e12, 1e-6] for c in costs], limits * [1e12, 1e-6], gap=0)
    assert one.choice == other.choice


def test_distortions_may_be_equal_noisy_or_negative() -> None:
    found = solve([[0.0, 0.0, 0.0], [-1.0, -1.1, -1.05]], [[3, 2, 1], [1, 2, 3]], [5], gap=0)
    assert found.choice == (2, 1)  # of equals the cheapest; never more cost for more distortion
    assert found.distortion == pytest.approx(-1.1)
    found = solve([[1.0, 1.0], [1.0, 1.0]], [[2, 2], [2, 2]], [100])
    assert found.choice == (0, 0)  # of equals the first
    assert (found.gap, found.method) == (0, "lagrangian")


def test_same_input_same_answer() -> None:
    distortions, costs, limits = instance(5, 30, 20, 3, 0.35)
    assert solve(distortions, costs, limits) == solve(distortions, costs, limits)


def test_ample_limits_take_the_least_distortion() -> None:
    distortions, costs, limits = instance(1, 8, 8, 2, 1.0)
    found = solve(distortions, costs, limits * 10)
    assert found.distortion == pytest.approx(sum(d.min() for d in distortions))
    assert found.gap == 0


def test_no_layers_is_no_problem() -> None:
    assert solve([], [], [5.0]).choice == ()


def test_limit_at_the_very_least() -> None:
    distortions, costs, limits = instance(2, 6, 5, 1, 0.0)
    found = solve(distortions, costs, limits)
    assert found.cost[0] == limits[0]


def test_out_of_reach_says_the_lowest() -> None:
    with pytest.raises(BudgetError, match=r"asked for macs 7, params 50, lowest macs 8, params 30"):
        solve([[1.0, 0.0]] * 2, [[[4, 15], [9, 20]]] * 2, [7, 50], names=["macs", "params"])


def test_budgets_that_exclude_each_other() -> None:
    either = [[0, 10], [10, 0]]  # cheap in one or in the other
    with pytest.raises(BudgetError, match="not all of them together"):
        solve([[0.0, 0.0]], [either], [5, 5], names=["a", "b"])
    with pytest.raises(BudgetError, match="together"):  # half of each would do, so that only integrality fails
        solve([[0.0, 0.0]] * 3, [either] * 3, [15, 15])
    assert sorted(solve([[0.0, 0.0]] * 2, [either] * 2, [10, 10]).choice) == [0, 1]


@pytest.mark.parametrize(
    ("distortions", "costs", "limits"),
    [
        ([[1.0, 2.0]], [[1.0]], [1.0]),
        ([[1.0]], [[[1.0, 2.0]]], [1.0]),
        ([[]], [[]], [1.0]),
        ([[1.0]], [], [1.0]),
        ([[float("nan")]], [[1.0]], [1.0]),
        ([[1.0]], [[float("inf")]], [1.0]),
    ],
)
def test_inputs_that_do_not_fit(distortions: list[list[float]], costs: list[list[float]], limits: list[float]) -> None:
    with pytest.raises(BudgetError):
        solve(distortions, costs, limits)


@pytest.mark.parametrize("budgets", [1, 2, 3])
def test_pareto_front_is_what_nothing_beats(budgets: int) -> None:
    g = np.random.default_rng(0)
    distortion, costs = g.integers(0, 12, 120).astype(float), g.integers(0, 12, (120, budgets)).astype(float)
    every = np.column_stack([distortion, costs])

    def beaten(i: int) -> bool:
        no_worse = (every <= every[i]).all(1)
        better = no_worse & (every < every[i]).any(1)
        earlier_twin = no_worse & ~better & (np.arange(120) < i)
        return bool((better | earlier_twin).any())

    kept = pareto(distortion, costs)
    assert sorted(kept.tolist()) == [i for i in range(120) if not beaten(i)]
    assert (np.diff(distortion[kept]) <= 0).all()


def test_the_solver_keeps_quiet_on_stdout(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """HiGHS prints a line of its own now and then, whatever its options say; stdout is for the results of a command."""
    calls = []

    def noisy(*args: Any, **kwargs: Any) -> Any:
        os.write(1, b"HighsMipSolverData::transformNewIntegerFeasibleSolution tmpSolver.run();\n")
        calls.append(1)
        return milp(*args, **kwargs)

    milp = scipy.optimize.milp
    monkeypatch.setattr(scipy.optimize, "milp", noisy)
    for seed in range(20):
        solve(*instance(seed, 6, 12, 2, 0.4))
    os.write(1, b"heard\n")
    assert calls
    assert capfd.readouterr().out == "heard\n"


def test_threads_that_solve_at_once_leave_stdout_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    inside, leave = threading.Event(), threading.Event()

    def second() -> None:
        with _quiet():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=second)
    with _quiet():
        thread.start()
        assert not inside.wait(0.1)  # else it would keep the nowhere of the first one for the stdout to put back
    assert inside.wait(10)
    leave.set()
    thread.join()
    os.write(1, b"result")
    assert capfd.readouterr().out == "result"
