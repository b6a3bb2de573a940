"""Comparison of runs: methods by budgets, over seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any

from tenfold.records import Metric, RunRecord
from tenfold.reporting.grouping import grouped
from tenfold.reporting.numbers import limits, plural
from tenfold.reporting.run_files import Run


def _ratio(after: float | None, before: float | None) -> float | None:
    return None if not before or after is None else after / before


def _speedup(record: RunRecord) -> float | None:
    if record.speedup is not None:
        return None if record.speedup.doubt else record.speedup.ratio
    return _ratio(record.before.latency_ms, record.after.latency_ms)


def _drop(record: RunRecord) -> float | None:
    start = record.scores.get("original", record.before.score)
    return None if start is None or record.after.score is None else record.after.score - start


# Shares of the model before, how many times faster, the score, and what it changed by.
METRICS: dict[str, Callable[[RunRecord], float | None]] = {
    "params": lambda r: _ratio(r.after.params, r.before.params),
    "macs": lambda r: _ratio(r.after.macs, r.before.macs),
    "speedup": _speedup,
    "score": lambda r: r.after.score,
    "change": _drop,
}


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of the runs that have a number; the latter None for a single one."""

    mean: float
    sd: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Return the spread of numbers; None without any.

        Example:
            >>> Spread.of([1.0, 3.0])
            Spread(mean=2.0, sd=1.4142135623730951, count=2)
        """
        if not values:
            return None
        return cls(mean(values), stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in nothing but their seed, with the spread of everything that was measured in one of them."""

    model: str
    method: str
    budget: str
    runs: tuple[Run, ...]
    values: Mapping[str, Spread] = field(default_factory=dict)

    @property
    def metric(self) -> Metric:
        """What the scores of the runs are."""
        return self.runs[0].record.metric

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the runs, in order."""
        return tuple(sorted(run.record.seed for run in self.runs))


def compare(runs: Sequence[Run]) -> tuple[Group, ...]:
    """Return runs in groups of the same task, method, budget and settings, by model, method and the MACs left.

    Methods whose names are the same though some setting differs have that setting in their name.

    Example:
        >>> compare([])
        ()
    """
    same = grouped(runs, lambda run: _key(run.record))
    names = _method_names([group[0].record for group in same])
    groups = [_group(group, name) for group, name in zip(same, names, strict=True)]
    return tuple(sorted(groups, key=_order))


def best(groups: Sequence[Group], cost: str = "macs") -> set[Group]:
    """Return the groups that no other of the same model and metric beats both in score and in cost (the Pareto front).

    Those without a score are not among them.
    """
    return {g for g in _scored(groups, cost) if not any(_beats(o, g, cost) for o in _scored(groups, cost))}


def _scored(groups: Sequence[Group], cost: str) -> list[Group]:
    return [group for group in groups if "score" in group.values and cost in group.values]


def _beats(one: Group, other: Group, cost: str) -> bool:
    if (one.model, one.metric) != (other.model, other.metric):
        return False
    a, b = one.values, other.values
    lost = one.metric.lost(b["score"].mean, a["score"].mean)
    no_worse = lost <= 0 and a[cost].mean <= b[cost].mean
    return no_worse and (lost < 0 or a[cost].mean < b[cost].mean)


def _order(group: Group) -> tuple[str, str, float]:
    return group.model, group.method, group.values["macs"].mean if "macs" in group.values else 0.0


def _group(runs: Sequence[Run], method: str) -> Group:
    values = {}
    for name, measure in METRICS.items():
        spread = Spread.of([v for v in (measure(run.record) for run in runs) if v is not None])
        if spread is not None:
            values[name] = spread
    record = runs[0].record
    return Group(record.task or record.plan.model, method, budget_of(record), tuple(runs), values)


def score_head(groups: Sequence[Group], otherwise: str = "score") -> str:
    """Return what a column of scores is called: the metric, or a word for any where groups have several."""
    labels = {group.metric.label for group in groups if "score" in group.values}
    return labels.pop() if len(labels) == 1 else otherwise


def budget_of(record: RunRecord) -> str:
    """Return the budget in words, as shares of the model before; a dash where there was none."""
    return ", ".join(limits(record.plan.recipe.budget, record.before, of=" ")) or "—"


def _key(record: RunRecord) -> str:
    what = [record.task or record.plan.model, budget_of(record), _settings(record), record.metric.model_dump()]
    return json.dumps(what, sort_keys=True)


def _settings(record: RunRecord) -> dict[str, Any]:
    """Return what was chosen, by dotted name, without seeds and the budget."""
    algorithms = {str(x.format): (x.algorithm or {}).get("name", "") for x in record.plan.factorized}
    recipe = record.plan.recipe.model_dump(mode="json", exclude={"budget", "seed", "algorithms"})
    chosen = recipe | {"algorithm": algorithms} | record.settings
    epochs = sum(len(stage.tuning) for stage in record.stages) or len(record.tuning)
    chosen |= {"epochs": epochs, "stages": len(record.stages)}
    found = dict(_flat(chosen, ""))
    return {k: v for k, v in found.items() if k.rpartition(".")[2] not in {"seed", "budget"}}


def _flat(value: Any, name: str) -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        return [] if value is None else [(name, value)]
    return [pair for k, v in value.items() for pair in _flat(v, f"{name}.{k}" if name else str(k))]


def _plain_name(record: RunRecord) -> str:
    plan = record.plan
    names = {str(layer.format) for layer in plan.factorized if layer.path not in plan.narrowed_paths}
    names |= {unit.kind for unit in plan.narrowed}
    parts = [" + ".join(sorted(names)) or "nothing", record.plan.recipe.rule_name]
    if record.stages:
        parts.append(plural(len(record.stages), "stage"))
    epochs = sum(len(stage.tuning) for stage in record.stages) or len(record.tuning)
    parts.append(plural(epochs, "epoch"))
    return ", ".join(parts)


def _method_names(records: Sequence[RunRecord]) -> list[str]:
    """Return a name for each, with the settings in which those of one name, model and budget differ."""
    plain = [(r.task or r.plan.model, budget_of(r), _plain_name(r)) for r in records]
    settings = [_settings(r) for r in records]
    names = []
    for i, own in enumerate(plain):
        alike = [settings[j] for j, other in enumerate(plain) if other == own]
        differing = sorted({k for s in alike for k in s if any(o.get(k) != s.get(k) for o in alike)})
        difference = ", ".join(f"{k}={settings[i].get(k)}" for k in differing)
        names.append(f"{own[2]} ({difference})" if difference else own[2])
    return names
