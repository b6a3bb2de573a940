"""Enumerate the ranks of a layer among which a rule selects: one row source for each way to do so."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tenfold.allocation import RankRule
from tenfold.allocation.rules.evbmf import EVBMF
from tenfold.allocation.rules.fixed import Fixed
from tenfold.decompositions import error_curve
from tenfold.errors import UnknownNameError
from tenfold.formats import FORMATS, Rank
from tenfold.patterns import first_match
from tenfold.planning.eligible import EligibleLayer, costs_of, saves
from tenfold.planning.error_curves import spectra_of, tail_shares
from tenfold.registry import did_you_mean
from tenfold.tensors.vbmf import evbmf

Ranks = NDArray[np.int64]
Columns = dict[str, NDArray[np.float64]]
RowSource = Callable[[EligibleLayer, str, Tensor, RankRule], tuple[Ranks, Columns]]

# Small layers have few ranks to choose from, so that their grid is finer: (up to this full rank, step).
_STEPS = ((16, 1), (32, 2), (64, 4))
_HARDWARE_STEP = 8
_MOST_NAMES = 4  # beyond, there are too many combinations of full ranks to try
_ROUND = 1e-13  # what rounding leaves of a spectrum where nothing is dropped

ROWS: dict[str, RowSource] = {}


def row_source(name: str) -> Callable[[RowSource], RowSource]:
    """Return a decorator that registers a row source under the name that rules put into ``rows``.

    A row source is a function of a layer, a format, the layer's weight (groups apart) and the rule. It returns ranks
    (n, names), and columns (n,) that are known on the way.
    """

    def store(source: RowSource) -> RowSource:
        ROWS[name] = source
        return source

    return store


def rows_of(layer: EligibleLayer, format: str, weight: Tensor, rule: RankRule) -> tuple[Ranks, Columns]:
    """Return the ranks (n, names) of the rule's row source, and the columns it knows."""
    if rule.rows not in ROWS:
        msg = f"the rule {rule.name()} asks for unknown rows {rule.rows!r}. {did_you_mean(rule.rows, ROWS)}"
        raise UnknownNameError(msg)
    return ROWS[rule.rows](layer, format, weight, rule)


def without_idle_factors(
    layer: EligibleLayer, format: str, ranks: Ranks
) -> tuple[Ranks, dict[int, int], dict[int, str]]:
    """Return ranks that beat others by making some of them full, which row becomes which, and a note for each.

    64 → 62 → 20 channels, 1×1 and then 3×3, take more multiplications than 64 → 20 at once. At full rank the format
    leaves that factor out, which is the two multiplied out, exactly, and what the factor had dropped comes back for
    nothing.
    """
    fuller, cheaper = _fuller(layer, format, ranks)
    rows = np.flatnonzero(cheaper)
    unique, place = np.unique(fuller[rows], axis=0, return_inverse=True)
    becomes = dict(zip(rows.tolist(), place.reshape(-1).tolist(), strict=True))
    kind = FORMATS.get(format)
    notes = {row: _note(kind.rank_names, ranks[row], fuller[row]) for row in becomes}
    named = (dict(zip(kind.rank_names, row, strict=True)) for row in unique.tolist())
    return kind.rows(kind.check_rank(layer.spec, rank) for rank in named), becomes, notes


def _fuller(layer: EligibleLayer, format: str, ranks: Ranks) -> tuple[Ranks, NDArray[np.bool_]]:
    """Return the ranks with those made full that cost more than they save, and in which rows there are such."""
    count = ranks.shape[1]
    best, changed = ranks.copy(), np.zeros(len(ranks), dtype=bool)
    if count > _MOST_NAMES or not len(ranks):
        return best, changed
    full = np.array(list(FORMATS.get(format).max_rank(layer.spec).values()))
    least = costs_of(layer, format, ranks)
    saving = saves(layer, *least)
    for size in range(1, count + 1):
        for names in map(list, combinations(range(count), size)):
            tried = ranks.copy()
            tried[:, names] = full[names]
            costs = costs_of(layer, format, tried)
            better = saving & _below(layer, costs, least)
            best[better], changed[better] = tried[better], True
            least = (np.where(better, costs[0], least[0]), np.where(better, costs[1], least[1]))
    return best, changed


def _below(layer: EligibleLayer, costs: tuple[Ranks, Ranks], than: tuple[Ranks, Ranks]) -> NDArray[np.bool_]:
    (params, macs), (old_params, old_macs) = costs, than
    if not layer.cost.macs:  # what has none, a lookup in an embedding, is judged by its parameters
        return np.asarray(params < old_params)
    return np.asarray((params <= old_params) & (macs <= old_macs) & ((params < old_params) | (macs < old_macs)))


def _note(names: tuple[str, ...], before: Ranks, after: Ranks) -> str:
    changed = ", ".join(f"{n} {b}" for n, b, a in zip(names, before.tolist(), after.tolist(), strict=True) if a != b)
    return f"; {changed} made full: cheaper without that factor"


def liked_step(layer: EligibleLayer) -> int | None:
    """Return what ranks should be multiples of where a runtime was measured to work in blocks of so many channels."""
    return layer.step if layer.step is not None and layer.step >= _HARDWARE_STEP else None


def in_steps(layer: EligibleLayer, format: str, ranks: Ranks) -> Ranks:
    """Return ranks in whole blocks of the runtime's channels, as far as the layer still gets cheaper.

    A part of a block takes the time of a whole one, and channels that do not end in whole blocks may take far more:
    so ranks go up to the next multiple.
    """
    step = liked_step(layer)
    if step is None or not len(ranks):
        return ranks
    kind = FORMATS.get(format)
    full = np.array(list(kind.max_rank(layer.spec).values()))
    up = np.minimum(-(-ranks // step) * step, full)
    cheaper = saves(layer, *costs_of(layer, format, up)) & saves(layer, *costs_of(layer, format, ranks))
    named = (dict(zip(kind.rank_names, row, strict=True)) for row in up.tolist())
    valid = kind.rows(kind.check_rank(layer.spec, rank) for rank in named)
    return np.where(cheaper[:, None], valid, ranks)


@row_source("grid")
def grid(layer: EligibleLayer, format: str, weight: Tensor, rule: RankRule) -> tuple[Ranks, Columns]:
    """Multiples of a step, and full rank; all pairs of two ranks. Only what makes the layer cheaper.

    The step is the rule's, or what the runtime was measured to like; otherwise 8, which suits most hardware, but 4, 2
    or 1 where full rank is at most 64, 32 or 16.
    Formats with more than two ranks say which are worth a try.
    """
    del weight
    step = getattr(rule, "step", None) or liked_step(layer)

    def axis(full: int) -> list[int]:
        stride = step or next((s for most, s in _STEPS if full <= most), _HARDWARE_STEP)
        return [*range(stride, full, stride), full]

    ranks = FORMATS.get(format).rank_grid(layer.spec, axis)
    ranks = ranks[saves(layer, *costs_of(layer, format, ranks))]
    return ranks, {}


@row_source("family")
def family(layer: EligibleLayer, format: str, weight: Tensor, rule: RankRule) -> tuple[Ranks, Columns]:
    """Ranks from small to full along the format's family."""
    del weight, rule
    return FORMATS.get(format).rows(FORMATS.get(format).rank_family(layer.spec)), {}


@row_source("saving")
def saving_family(layer: EligibleLayer, format: str, weight: Tensor, rule: RankRule) -> tuple[Ranks, Columns]:
    """Every ``step``-th of the ranks of the format's family that make the layer cheaper."""
    ranks, _ = family(layer, format, weight, rule)
    ranks = ranks[saves(layer, *costs_of(layer, format, ranks))]
    step = getattr(rule, "step", None) or 1
    every = ranks[step - 1 :: step]
    return every if len(every) else ranks[-1:], {}


@row_source("tolerance")
def tolerance(layer: EligibleLayer, format: str, weight: Tensor, rule: RankRule) -> tuple[Ranks, Columns]:
    """The smallest ranks for every tolerance, coarsest first, with the share of ‖W‖² that they drop.

    Each of n unfoldings may drop 1/n of the tolerance. Between two tolerances at which some rank changes, the ranks are
    the same: so there are as many rows as singular values.
    """
    kind = FORMATS.get(format)
    if not kind.svd_bounds_error:
        ranks, _ = family(layer, format, weight, rule)
        return ranks, {"dropped": np.asarray(error_curve(weight, layer.spec, kind)(ranks)) - _ROUND}
    spectra = spectra_of(layer, format, weight)
    tails = [tail_shares(spectra[name])[1:] - _ROUND for name in kind.rank_names]  # from rank 1 on
    dropped = np.unique(np.maximum(np.concatenate(tails), 0.0))[::-1]
    dropped = dropped[dropped <= max(0.0, *(tail[0] for tail in tails))]
    ranks = np.stack([np.searchsorted(-tail, -dropped) + 1 for tail in tails], axis=1)
    return ranks, {"dropped": len(tails) * dropped}


@row_source("weakened")
def weakened(layer: EligibleLayer, format: str, weight: Tensor, rule: RankRule) -> tuple[Ranks, Columns]:
    """The EVBMF ranks at every weakening, weakest first; none where the weight is all noise.

    A row holds for weakenings above that of the row before it up to its own, in the column ``weaken``.
    """
    assert isinstance(rule, EVBMF)  # noqa: S101 - the rows of this rule
    kind, now = FORMATS.get(format), _rank_now(layer, format)
    columns = _columns_now(layer, format, now)
    extreme = {
        name: evbmf(values[: min(now[name], columns[name])], columns[name], threshold=rule.threshold).rank
        for name, values in spectra_of(layer, format, weight).items()
    }
    if not any(extreme.values()):
        return np.zeros((0, len(kind.rank_names)), dtype=np.int64), {"weaken": np.zeros(0)}
    changes = {0.0, 1.0, rule.weaken}
    for name, least in extreme.items():
        if least and now[name] > max(rule.min_rank, least):
            changes |= {(now[name] - r) / (now[name] - least) for r in range(max(least, rule.min_rank), now[name])}
    ends = sorted(changes)
    covering: dict[tuple[int, ...], Rank] = {}
    rows = []
    for before, end in zip([0.0, *ends], ends, strict=False):
        at = end if end in (0.0, rule.weaken) else (before + end) / 2  # inside, where rounding cannot change the rank
        ranks = {name: _weakened(now[name], extreme[name], at, rule.min_rank) for name in extreme}
        key = tuple(ranks.values())
        if key not in covering:
            covering[key] = kind.check_rank(layer.spec, kind.covering(layer.spec, ranks))
        rows.append(covering[key])
    return FORMATS.get(format).rows(rows), {"weaken": np.array(ends)}


@row_source("given")
def given(layer: EligibleLayer, format: str, weight: Tensor, rule: RankRule) -> tuple[Ranks, Columns]:
    """The one rank that was given for the layer, in the first format that supports it."""
    del weight
    assert isinstance(rule, Fixed)  # noqa: S101 - the rows of this rule
    kind = FORMATS.get(format)
    pattern = first_match(rule.ranks, layer.path)
    if pattern is None or format != layer.formats[0]:
        return FORMATS.get(format).rows([]), {}
    asked = rule.ranks[pattern]
    rank = dict.fromkeys(kind.rank_names, asked) if isinstance(asked, int) else asked
    return kind.rows([kind.check_rank(layer.spec, rank)]), {}


def _rank_now(layer: EligibleLayer, format: str) -> Rank:
    """Return the ranks to weaken from: those of the layer if it has this format, else the full ones."""
    full = FORMATS.get(format).max_rank(layer.spec)
    return full | layer.current[1] if layer.current is not None and layer.current[0] == format else full


def _columns_now(layer: EligibleLayer, format: str, now: Rank) -> Rank:
    """Return the columns of each unfolding of the core: the share of the weight's that the other ranks leave."""
    kind = FORMATS.get(format)
    full = kind.max_rank(layer.spec)
    left = {name: prod(now[n] / full[n] for n in now if n != name) for name in now}
    shapes = kind.unfoldings(torch.empty(layer.spec.group_shape, device="meta"), layer.spec)
    return {name: max(round(max(matrix.shape[-2:]) * left[name]), 1) for name, matrix in shapes.items()}


def _weakened(now: int, extreme: int, weaken: float, min_rank: int) -> int:
    if now <= min_rank or extreme == 0:
        return now
    return max(int(now - weaken * (now - extreme)), min_rank)
