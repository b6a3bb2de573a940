"""What a plan chose from, kept so that others can be made without the model: formats, ranks, costs, damage, time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from tenfold import __version__
from tenfold.decompositions import Decomposition, Moments, default_algorithm
from tenfold.formats import FORMATS
from tenfold.knapsack import pareto
from tenfold.planning.damage import Curve
from tenfold.planning.fast import FastPlan
from tenfold.planning.merging import MOST_NAMES, without_idle_stages
from tenfold.planning.timing import Timing
from tenfold.planning.tradeoff import BY_WEIGHT
from tenfold.planning.undecided import Memory, kept_layers, problems_of
from tenfold.ranks import Choose, RankProblem
from tenfold.ranks.candidates import Grid, grids
from tenfold.ranks.globally import damages_of, latencies_of
from tenfold.records import Candidates, LayerCandidates, LayerProfile, Merged, Options, Plan, Profile

BY_DATA = "what the network's output loses, predicted from unlabeled data"
BY_TABLE = "as a table of sensitivities says, each layer factorized alone"

Array = NDArray[np.float64]


def candidates(  # noqa: PLR0913 - what a plan was made with
    model: nn.Module,
    profile: Profile,
    plan: Plan,
    *,
    formats: Sequence[str],
    keep: Sequence[str] = (),
    keep_ends: bool | None = None,
    algorithms: Mapping[str, Decomposition] | None = None,
    moments: Mapping[str, Moments] | None = None,
    damages: Callable[[str, str], Curve] | None = None,
    timing: Timing | None = None,
    reasons: Mapping[str, str] | None = None,
    memory: Memory | None = None,
    seed: int = 0,
) -> Candidates:
    """Return what a plan by the rule ``global`` chose from: the optimum for any other budget can be found in it.

    Of each format only what some budget could prefer is kept: the Pareto fronts of damage and costs. The optimum among
    all ranks of the grid is among these, so that nothing is lost.

    Args:
        model: that was profiled.
        profile: what ``profile`` said of it.
        plan: that was made.
        formats: as they were given to ``plan``, and so are those that follow.
        keep: layers to leave alone.
        keep_ends: leave a cheap first and last layer alone.
        algorithms: by format, instead of the format's default algorithm.
        moments: of the inputs of the layers.
        damages: what the rule weighed instead.
        timing: how long model and layers take; without, there are no milliseconds.
        reasons: further layers that were left alone, by path.
        memory: what plans for the same weights computed of them, which is not computed again.
        seed: of the algorithms.

    Example:
        >>> import torch
        >>> from tenfold.planning import plan
        >>> from tenfold.profiling import profile
        >>> from tenfold.ranks import rule_from
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> cost, choices = profile(net, torch.zeros(1, 64)), {"formats": ["low_rank"]}
        >>> made = plan(net, cost, rule=rule_from("global"), budget={"macs": 0.5}, **choices)
        >>> found = candidates(net, cost, made, **choices)
        >>> found.layers[0].path, found.layers[0].of("low_rank").ranks[:3]
        ('0', ((4,), (8,), (12,)))
    """
    kept = kept_layers(
        model, profile, formats, keep=keep, keep_ends=keep_ends is not False, moments=moments, reasons=reasons
    )
    undecided = [path for path, reason in kept.items() if not reason]

    def problems(of: Profile) -> list[RankProblem]:
        layers = [of.layer(path) for path in undecided]
        return problems_of(model, layers, formats, moments=moments, damages=damages, memory=memory)

    found = problems(profile)
    if timing is not None:  # whose profile may be of another batch size
        times = timing.time(problems(timing.profile))
        found = [
            dataclasses.replace(p, latency_ms=t.latency_ms, latency_at=t.latency_at)
            for p, t in zip(found, times, strict=True)
        ]
    now = {path: profile.layer(path) for path in undecided}
    layers = tuple(_layer(p, now[p.path], plan.rule.get("step")) for p in found)
    used = dict.fromkeys(o.format for layer in layers for o in layer.options)
    finders = {f: (algorithms or {}).get(f) or default_algorithm(f, seed, data_aware=moments is not None) for f in used}
    return Candidates(
        tenfold=__version__,
        plan=plan,
        damage=BY_TABLE if damages is not None else BY_WEIGHT if moments is None else BY_DATA,
        algorithms={format: finder.to_dict() for format, finder in finders.items()},
        layers=layers,
        time=None if timing is None else timing.forward_time(),
    )


def candidates_for(
    model: nn.Module, profile: Profile, plan: Plan, fast: FastPlan | None = None, **choices: Any
) -> Candidates | None:
    """Return what a plan chose from; None where its rule is not ``global``, which alone looks for an optimum.

    Args:
        model: that was profiled.
        profile: what ``profile`` said of it.
        plan: that was made.
        fast: the measurements behind it, where there are any: layers that were not faster have no candidates.
        choices: as they were given to ``plan``; those that do not matter here are not looked at.
    """
    if plan.rule.get("name") != "global":
        return None
    own = {name: value for name, value in choices.items() if name not in {"rule", "budget", "workers"}}
    if fast is not None:
        own |= {"timing": fast.timing, "reasons": {path: plan.layer(path).reason for path in fast.returned}}
    return candidates(model, profile, plan, **own)


def _layer(problem: RankProblem, now: LayerProfile, step: int | None) -> LayerCandidates:
    return LayerCandidates(
        path=problem.path,
        format=now.format,
        rank=now.rank,
        latency_ms=problem.latency_ms,
        options=tuple(_options(problem, grid) for grid in grids(problem, step=step) if len(grid)),
    )


def _options(problem: RankProblem, grid: Grid) -> Options:
    """Return what is worth a choice of a grid."""
    damage = damages_of(problem, grid)
    times = None if problem.latency_ms is None else latencies_of(problem, grid)
    columns = [grid.params, grid.macs, *([] if times is None else [times])]
    kept = fronts(damage, np.stack(columns, axis=1).astype(np.float64))
    grid = Grid(grid.format, grid.names, grid.ranks[kept], grid.params[kept], grid.macs[kept])
    return Options(
        format=grid.format,
        names=grid.names,
        ranks=tuple(map(tuple, grid.ranks.tolist())),
        params=tuple(grid.params.tolist()),
        macs=tuple(grid.macs.tolist()),
        damage=tuple(damage[kept].tolist()),
        latency_ms=() if times is None else tuple(times[kept].tolist()),
        merged=tuple(_merged(problem, grid, damage[kept])),
    )


def fronts(damage: Array, costs: Array) -> NDArray[np.intp]:
    """Return the indices, ascending, of all that is on the Pareto front of damage and some combination of costs.

    Args:
        damage: of the options (n,).
        costs: of the options (n, budgets).

    Example:
        >>> fronts(np.array([0.5, 0.1, 0.2]), np.array([[1.0, 1.0], [3.0, 2.0], [4.0, 3.0]])).tolist()
        [0, 1]
    """
    count = costs.shape[1]
    wanted = (list(names) for size in range(1, count + 1) for names in combinations(range(count), size))
    return np.unique(np.concatenate([pareto(damage, costs[:, names]) for names in wanted]))


def _merged(problem: RankProblem, grid: Grid, damage: Array) -> list[Merged]:
    """Return what a plan makes of those options at which two stages multiplied out cost less than the two."""
    found = []
    for option in _cheaper_when_fuller(problem, grid):
        rank = grid.candidate(option).rank
        choice = without_idle_stages(problem, Choose(grid.format, rank, "", float(damage[option])))
        if isinstance(choice, Choose) and choice.rank != rank:
            found.append(
                Merged(
                    option=option,
                    rank=choice.rank,
                    cost=problem.cost_at(choice.format, choice.rank),
                    damage=choice.damage,
                    latency_ms=None if problem.latency_ms is None else problem.latency(choice),
                    note=choice.note,
                )
            )
    return found


def _cheaper_when_fuller(problem: RankProblem, grid: Grid) -> list[int]:
    """Return the places in a grid where the layer would cost less if one rank or more were full."""
    count = len(grid.names)
    if count > MOST_NAMES:
        return []
    most = FORMATS.get(grid.format).max_rank(problem.spec)
    full = np.array([most[name] for name in grid.names])
    cheaper = np.zeros(len(grid), dtype=bool)
    for size in range(1, count + 1):
        for names in map(list, combinations(range(count), size)):
            ranks = grid.ranks.copy()
            ranks[:, names] = full[names]
            params, macs = problem.costs_at(grid.format, ranks)
            less, no_more = (params < grid.params, params <= grid.params)
            if problem.cost.macs:  # what has none, a lookup in an embedding, is judged by its parameters
                less, no_more = less | (macs < grid.macs), no_more & (macs <= grid.macs)
            cheaper |= less & no_more
    return np.flatnonzero(cheaper).tolist()
