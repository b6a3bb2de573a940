"""Many weights, decomposed in pieces that workers can share, with the same factors whoever does it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from tenfold.decompositions.base import Fit, Problem, decompose_many
from tenfold.errors import TenfoldError
from tenfold.parallel import Workers

# Larger weights are worth a piece of their own; smaller ones of equal shape are faster together.
_ALONE_ABOVE = 1 << 17


def together(problems: Sequence[Problem]) -> list[list[int]]:
    """Return the indices of the problems in pieces: those in one piece are decomposed together, wherever that is.

    Example:
        >>> import torch
        >>> from tenfold.decompositions import default_algorithm
        >>> from tenfold.decompositions.base import spec_of_weight
        >>> weights = [torch.ones(4, 4), torch.ones(4, 6), torch.ones(4, 4)]
        >>> svd = default_algorithm("low_rank")
        >>> together([Problem(w, spec_of_weight(w), "low_rank", {"rank": 2}, svd) for w in weights])
        [[0, 2], [1]]
    """
    pieces: dict[tuple[Any, ...], list[int]] = {}
    for i, problem in enumerate(problems):
        weight = problem.weight
        alone = i if weight.numel() > _ALONE_ABOVE or problem.metric is not None else -1
        key = (weight.shape, weight.dtype, problem.format, repr(problem.rank), problem.algorithm, alone)
        pieces.setdefault(key, []).append(i)
    return list(pieces.values())


def fit_pieces(
    pieces: Sequence[Sequence[Problem]], workers: Workers | None = None
) -> Iterator[list[Fit] | TenfoldError]:
    """Iterate over the fits of each piece, in order; for a piece with a problem that has none, over the reason.

    Args:
        pieces: problems that are ``together``.
        workers: who decomposes them if all weights are on the CPU; this process if None.
    """
    if workers is None or workers.is_local or any(p.weight.device.type != "cpu" for piece in pieces for p in piece):
        return (_fits(None, piece) for piece in pieces)
    return workers.map(_fits, None, ([_sendable(p) for p in piece] for piece in pieces))


def _fits(shared: None, problems: Sequence[Problem]) -> list[Fit] | TenfoldError:
    del shared
    try:
        return decompose_many(problems)
    except TenfoldError as error:
        return error


def _sendable(problem: Problem) -> Problem:
    """Return the problem with a weight that takes nothing else along: a view would bring all that it looks at."""
    return dataclasses.replace(problem, weight=problem.weight.detach().clone())
