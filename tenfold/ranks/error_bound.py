"""The smallest ranks that reach an error, found by fits: the same bound for every layer, in any format."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch

from tenfold.decompositions import Decomposition, Moments, algorithm_for, decompose
from tenfold.errors import DataError, TenfoldError
from tenfold.formats import FORMATS, Factorization, Rank, join_groups
from tenfold.parallel import Workers, parallel_map
from tenfold.ranks.base import RULES, Choice, OneKnobRule, RankProblem, first_saving
from tenfold.ranks.bracket import smallest_within
from tenfold.ranks.candidates import tail_damage
from tenfold.records import LayerSpec, locked, write_text
from tenfold.tensors import digest

Progress = Callable[[int, int], None]
Errors = dict[str, float]  # by rank, as JSON


@RULES.register("error")
@dataclass(frozen=True)
class ErrorBound(OneKnobRule):
    """Smallest ranks at which the factorization itself stays within a relative error, the same for all layers.

    Of formats with one unfolding the spectrum tells the rank at once. For all others, CP above all, factorizations are
    fitted: the rank is bracketed and the bracket closed where a straight line through its ends crosses the bound, each
    fit going on from that of the nearest rank (terms added, or the smallest ones dropped). Compare ``energy``, which
    needs no fits and gives ranks that suffice, but larger ones, and knows nothing of CP. With a budget the bound is
    found that meets it, on curves through a few quick fits of each layer.

    Attributes:
        rel_error: bound in (0, 1) of ‖W − Ŵ‖/‖W‖, or of the missed share √(E‖y−ŷ‖²/E‖y−ȳ‖²) of the output where there
            are moments; None to let a budget set it.
        within: stop when the rank is known to this share of itself. 0: the smallest one of the format's family.
        sweeps: of each fit, at most. The final fit takes its own, and as a rule comes lower.
        seed: of algorithms that draw random numbers.
        table: JSON file in which errors are kept, layer by layer: a search that was interrupted goes on there.
        workers: who searches, layer by layer; those that ``plan`` is given take over. This process if None.
        progress: called with (layers done, layers in all).
    """

    rel_error: float | None = None
    within: float = 0.02
    sweeps: int = 30
    seed: int = 0
    table: str | Path | None = field(default=None, compare=False)
    workers: Workers | None = field(default=None, repr=False, compare=False)
    progress: Progress | None = field(default=None, repr=False, compare=False)

    numbers: ClassVar[tuple[str, ...]] = ("rel_error",)

    def __post_init__(self) -> None:
        """Refuse bounds that mean nothing."""
        if self.rel_error is not None and not 0 < self.rel_error < 1:
            msg = f"rel_error={self.rel_error} must lie between 0 and 1"
            raise TenfoldError(msg)
        if not 0 <= self.within < 1 or self.sweeps < 1:
            msg = f"within={self.within} must be in [0, 1), and sweeps={self.sweeps} at least 1"
            raise TenfoldError(msg)

    def to_dict(self) -> dict[str, Any]:
        """Return name and configuration as plain values, without where and how the search is run."""
        skipped = ("table", "workers", "progress")
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in skipped}
        return {"name": self.name(), **plain}

    def with_workers(self, workers: Workers) -> Self:
        """Return the rule with who searches."""
        return dataclasses.replace(self, workers=workers)

    def knob(self) -> float | None:
        """Return the share of the norm to keep."""
        return None if self.rel_error is None else 1 - self.rel_error

    def choose(self, problem: RankProblem, knob: float) -> Choice:
        """Return the smallest rank whose error is expected to be at most 1 − ``knob``."""
        bound = 1 - knob

        def smallest(format: str) -> Rank | None:
            ranks = saving(problem, format)
            if not ranks:
                return None
            rows = np.array([[rank[name] for name in FORMATS.get(format).rank_names] for rank in ranks])
            met = np.flatnonzero(tail_damage(problem, format)(rows) <= bound**2 + _ROUND)
            return ranks[int(met[0])] if len(met) else None

        return first_saving(problem, smallest, f"expected relative error at most {bound:.3f}")

    def as_configured(self, problems: Sequence[RankProblem], knob: float) -> tuple[Choice, ...]:
        """Return for each layer the smallest rank that was fitted within the bound."""
        del knob
        table = _Table.open(self.table)
        found: list[dict[str, Rank | None]] = []
        searches = [_Search.of(problem, self, table) for problem in problems]
        for search, (ranks, errors) in zip(searches, parallel_map(self.workers, _run, None, searches), strict=True):
            found.append(ranks)
            table.add(search, errors)
            if self.progress is not None:
                self.progress(len(found), len(problems))
        what = "output" if any(p.metric is not None for p in problems) else "relative"
        note = f"{what} error at most {self.rel_error:g}, as fitted"
        return tuple(first_saving(p, ranks.get, note) for p, ranks in zip(problems, found, strict=True))


# Spectra carry rounding errors of about this share.
_ROUND = 1e-13


def saving(problem: RankProblem, format: str) -> list[Rank]:
    """Return the ranks of the format's family that make the layer cheaper, the smallest first."""
    return [rank for rank, cost in problem.family(format) if cost.below(problem.cost)]


@dataclass(frozen=True, eq=False)
class _Search:
    """One layer, to be searched in one format after the other; travels to a worker with nothing but its weight."""

    weight: torch.Tensor  # groups apart
    spec: LayerSpec
    ranks: dict[str, list[Rank]]
    rule: ErrorBound
    metric: Moments | None
    known: dict[str, Errors]  # by format
    keys: dict[str, str]  # by format

    @classmethod
    def of(cls, problem: RankProblem, rule: ErrorBound, table: _Table) -> _Search:
        """Return the search of a layer, with what is known of it."""
        weight = problem.load_weight().detach().clone()
        formats = problem.formats
        if problem.current is not None and problem.current[0] in formats:
            formats = (problem.current[0],)
        alone = dataclasses.replace(rule, table=None, workers=None, progress=None)
        own = _digest(weight, problem.spec, problem.metric)
        keys = {f: _key(own, f, _algorithm(alone, f, problem.metric)) for f in formats}
        known = {f: dict(table.errors.get(keys[f], {})) for f in formats}
        return cls(weight, problem.spec, {f: saving(problem, f) for f in formats}, alone, problem.metric, known, keys)

    def smallest(self, format: str) -> Rank | None:
        """Return the smallest rank within the bound; adds to what is known."""
        ranks, bound = self.ranks[format], float(self.rule.rel_error or 0.0)
        fits: dict[int, Factorization] = {}
        dense = join_groups(self.weight, self.spec)
        algorithm = _algorithm(self.rule, format, self.metric)

        def error_at(index: int) -> float:
            rank = json.dumps(ranks[index], sort_keys=True)
            if rank not in self.known[format]:
                near = min(fits, key=lambda i: abs(i - index), default=None)
                start = None if near is None else fits[near]
                fit = decompose(
                    dense, format, ranks[index], algorithm, spec=self.spec, moments=self.metric, start=start
                )
                fits[index] = fit.value
                self.known[format][rank] = fit.rel_error if fit.output_error is None else fit.output_error
            return self.known[format][rank]

        found = smallest_within(error_at, len(ranks), bound * (1 + _ROUND), within=self.rule.within)
        return None if found is None else ranks[found]

    def at_once(self, format: str) -> Rank | None:
        """Return the smallest rank that the one spectrum of the weight tells."""
        kind = FORMATS.get(format)
        (name,) = kind.rank_names
        squares = torch.linalg.svdvals(kind.unfoldings(self.weight.double(), self.spec)[name]).square().sum(0)
        tails = squares.sum() - squares.cumsum(0)
        bound = float(self.rule.rel_error or 0.0)
        least = int((tails <= (bound**2 + _ROUND) * squares.sum()).int().argmax()) + 1
        return next((rank for rank in self.ranks[format] if rank[name] >= least), None)


def _run(shared: None, search: _Search) -> tuple[dict[str, Rank | None], dict[str, Errors]]:
    """Return the ranks by format, up to the first that has one, and all errors that are known then."""
    del shared
    found: dict[str, Rank | None] = {}
    for format, ranks in search.ranks.items():
        kind = FORMATS.get(format)
        exact = search.metric is None and kind.tails_bound and len(kind.rank_names) == 1
        found[format] = None if not ranks else search.at_once(format) if exact else search.smallest(format)
        if found[format] is not None:
            break
    return found, search.known


def _algorithm(rule: ErrorBound, format: str, metric: Moments | None) -> Decomposition:
    """Return the format's algorithm with few sweeps."""
    algorithm = algorithm_for(format, seed=rule.seed, data_aware=metric is not None)
    return algorithm.with_settings({"n_iter": min(algorithm.to_dict().get("n_iter", rule.sweeps), rule.sweeps)})


def _digest(weight: torch.Tensor, spec: LayerSpec, metric: Moments | None) -> str:
    """Return what tells a weight under its data from all others."""
    return digest({"weight": weight}, repr(spec) + ("" if metric is None else metric.digest()))


def _key(own: str, format: str, algorithm: Decomposition) -> str:
    return f"{own} {format} {json.dumps(algorithm.to_dict(), sort_keys=True)}"


@dataclass(eq=False)
class _Table:
    """Errors by weight, format and algorithm, then by rank: those of other weights are never asked for."""

    path: Path | None
    errors: dict[str, Errors] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | Path | None) -> _Table:
        """Return what is in a file; nothing if there is none.

        Raises:
            DataError: the file is no such table.
        """
        table = cls(None if path is None else Path(path))
        if table.path is None or not table.path.exists():
            return table
        try:
            kept = json.loads(table.path.read_text(encoding="utf-8"))
            table.errors = {key: {r: float(e) for r, e in own.items()} for key, own in kept["errors"].items()}
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            msg = f"{path} is not a table of errors by rank: {error}. Choose another file, or delete this one."
            raise DataError(msg) from error
        return table

    def add(self, search: _Search, errors: dict[str, Errors]) -> None:
        """Take over what was found of a layer, and write it down beside what other searches wrote meanwhile."""
        new = {search.keys[format]: own for format, own in errors.items() if own}
        if self.path is None or all(self.errors.get(key) == own for key, own in new.items()):
            return
        with locked(self.path):
            there = _Table.open(self.path).errors
            for own in (self.errors, new):
                there |= {key: there.get(key, {}) | found for key, found in own.items()}
            self.errors = there
            write_text(self.path, json.dumps({"version": 1, "errors": there}, indent=1) + "\n")
