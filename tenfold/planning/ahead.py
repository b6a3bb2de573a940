"""What rules are going to ask of the layers - spectra, curves of the damage - computed ahead, layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from tenfold.decompositions import Moments
from tenfold.formats import FORMATS
from tenfold.parallel import Workers
from tenfold.planning.damage import Curve, known_curves, layer_curve
from tenfold.ranks import RankProblem
from tenfold.ranks.candidates import grids

Piece = tuple[RankProblem, str, Moments | None]


def compute_ahead(problems: Sequence[RankProblem], moments: Mapping[str, Moments] | None, workers: Workers) -> None:
    """Let workers compute what a rule that weighs damages asks of the problems, and keep it in these.

    A rule finds the same numbers whether or not this was called: it only need not wait for them.

    Args:
        problems: the layers to decide on, with weights on the CPU.
        moments: of the inputs of all of them: then it is the curves of ``with_damage``, else the spectra.
        workers: who computes; nothing is done ahead if that is this process.
    """
    if workers.here:
        return
    known = [(p, format) for p in problems for format in p.formats if format not in _kept(p, moments)]
    pieces = (_piece(p, format, None if moments is None else moments[p.path]) for p, format in known)
    for (problem, format), found in zip(known, workers.map(_compute, None, pieces), strict=True):
        _keep(problem, format, moments, found)


def _piece(problem: RankProblem, format: str, moments: Moments | None) -> Piece:
    """Return the problem with nothing but its own weight."""
    weight = problem.load_weight().detach().clone()
    alone = dataclasses.replace(
        problem, load_weight=lambda: weight, latency_at=None, latency_ms=None, damage_at=None, metric=None, _cache={}
    )
    return alone, format, moments


def _compute(shared: None, piece: Piece) -> Any:
    del shared
    problem, format, moments = piece
    if moments is None:
        return problem.spectra(format)
    curve: Curve = layer_curve(problem, format, moments)
    for grid in grids(dataclasses.replace(problem, formats=(format,))):
        if len(grid):
            curve(grid.ranks)  # which keeps what it has computed
    return curve


def _kept(problem: RankProblem, moments: Mapping[str, Moments] | None) -> Any:
    """Return what is known of a problem already, by format."""
    if moments is not None:
        return known_curves(problem, moments[problem.path])
    return {format for format in FORMATS.names() if ("spectra", format) in problem._cache}  # noqa: SLF001


def _keep(problem: RankProblem, format: str, moments: Mapping[str, Moments] | None, found: Any) -> None:
    if moments is None:
        problem._cache["spectra", format] = found  # noqa: SLF001
    else:
        _kept(problem, moments)[format] = found
