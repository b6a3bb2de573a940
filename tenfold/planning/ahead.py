"""What rules are going to ask of the layers - spectra, fits, curves of the damage - computed ahead, layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from tenfold.decompositions import Moments
from tenfold.formats import FORMATS
from tenfold.parallel import Workers
from tenfold.planning.damage import Curve, known_curves, layer_curve
from tenfold.ranks import RankProblem
from tenfold.ranks.candidates import grids, tail_damage

Piece = tuple[RankProblem, str, Moments | None]


def compute_ahead(
    problems: Sequence[RankProblem],
    moments: Mapping[str, Moments] | None,
    workers: Workers,
    *,
    step: int | None = None,
) -> None:
    """Let workers compute what a rule that weighs damages asks of the problems, and keep it in these.

    A rule finds the same numbers whether or not this was called: it only need not wait for them.

    Args:
        problems: the layers to decide on, with weights on the CPU.
        moments: of the inputs of all of them: then it is the curves of ``with_damage``, else that of ``tail_damage``.
        workers: who computes; nothing is done ahead if that is this process.
        step: of the grid of ranks that the rule asks for.
    """
    if workers.is_local:
        return
    new = [(p, format) for p in problems for format in p.formats if _key(format, moments) not in _memory(p, moments)]
    pieces = (_piece(p, format, None if moments is None else moments[p.path]) for p, format in new)
    for (problem, format), found in zip(new, workers.map(_compute, step, pieces), strict=True):
        _memory(problem, moments)[_key(format, moments)] = found


def _piece(problem: RankProblem, format: str, moments: Moments | None) -> Piece:
    """Return the problem in one format with nothing but its own weight."""
    weight = problem.load_weight().detach().clone()
    alone = dataclasses.replace(
        problem, load_weight=lambda: weight, latency_at=None, latency_ms=None, damage_at=None, metric=None, _cache={}
    )
    return dataclasses.replace(alone, formats=(format,)), format, moments


def _compute(step: int | None, piece: Piece) -> Any:
    problem, format, moments = piece
    curve: Curve = tail_damage(problem, format) if moments is None else layer_curve(problem, format, moments)
    for grid in grids(problem, step=step):
        if len(grid):
            curve(grid.ranks)  # which keeps what it has computed
    return curve if moments is not None else _memory(problem, None)[_key(format, None)]


def _memory(problem: RankProblem, moments: Mapping[str, Moments] | None) -> dict[Any, Any]:
    """Return where a problem remembers what is asked of it."""
    if moments is not None:
        return known_curves(problem, moments[problem.path])
    return problem._cache  # noqa: SLF001 - the memory of a problem is for those who plan


def _key(format: str, moments: Mapping[str, Moments] | None) -> Any:
    """Return under which key it does so: that of curves, or without moments of what ``tail_damage`` goes by."""
    if moments is not None:
        return format
    return ("spectra" if FORMATS.get(format).tails_bound else "fitted", format)
