"""The comparison of runs as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tenfold.records import write_text
from tenfold.reporting.charts import Chart, dense_rule, xy
from tenfold.reporting.comparison import Group, Spread, best, score_head
from tenfold.reporting.grouping import grouped
from tenfold.reporting.numbers import plural
from tenfold.reporting.pages import page
from tenfold.reporting.table_parts import Cell, Column, Row

_SHOWN = {"params": "params (%)", "macs": "MACs (%)", "speedup": "speed-up"}
_COSTS = {"params": "parameters left (%)", "macs": "MACs left (%)", "speedup": "times faster"}


def write_comparison(groups: Sequence[Group], path: str | Path) -> Path:
    """Write the comparison as one HTML file, whole or not at all, and return its path.

    Args:
        groups: as ``compare`` returned them.
        path: of the file.
    """
    path = Path(path)
    write_text(path, comparison(groups))
    return path


def comparison(groups: Sequence[Group]) -> str:
    """Return the comparison of runs as HTML that needs nothing else."""
    drawn: dict[str, Chart] = {}
    charts = []
    for number, same in enumerate(grouped(groups, lambda group: (group.model, group.metric.label))):
        for cost in ("macs", "params", "speedup"):
            chart = front_chart(same, cost)
            if chart is not None and (cost != "params" or "macs" not in same[0].values):
                drawn[f"{cost}-{number}"] = chart
                about = "Means over seeds with their standard deviations; dashed, the dense model."
                title = f"{same[0].model}: {same[0].metric.name} by {_TITLES[cost]}"
                charts.append({"id": f"{cost}-{number}", "title": title, "about": about})
    columns, rows = _table(groups)
    runs = sum(len(group.runs) for group in groups)
    models = len({group.model for group in groups})
    return page(
        "compare.html",
        title=f"{plural(runs, 'run')} compared",
        data={"charts": drawn},
        lead=f"{plural(len(groups), 'setting')} of {plural(models, 'model')}; runs that differ only in their seed are "
        "one row, mean ± standard deviation.",
        charts=charts,
        columns=columns,
        rows=rows,
        runs=[(run.name, group.method, group.budget, str(run.record.seed)) for group in groups for run in group.runs],
    )


_TITLES = {"macs": "MACs", "params": "parameters", "speedup": "speed"}


def front_chart(groups: Sequence[Group], cost: str) -> Chart | None:
    """Return score against a cost, one series for each method, with its spread; None where there are no scores."""
    scored = [group for group in groups if "score" in group.values and cost in group.values]
    if not scored:
        return None
    methods = list(dict.fromkeys(group.method for group in groups))  # of one colour in all charts
    series = [
        {
            "name": same[0].method,
            "points": sorted((_point(group, cost) for group in same), key=lambda point: float(point[0])),
            "colour": methods.index(same[0].method),
        }
        for same in grouped(scored, lambda group: group.method)
    ]
    metric = groups[0].metric
    alt = f"{metric.name} by {cost} of {groups[0].model}"
    rules = dense_rule(groups[0].runs[0].record.before.score, metric)
    drawn = xy(alt, {"label": _COSTS[cost]}, {"label": metric.label}, series, rules=rules)
    return {**drawn, "legend": True}


def _point(group: Group, cost: str) -> list[Any]:
    score, metric = group.values["score"], group.metric
    shown = f"{score_text(group)} {metric.shown_unit}".rstrip()
    words = f"{group.method}\n{group.budget}: {metric.name} {shown}"
    x = (1.0 if cost == "speedup" else 100.0) * group.values[cost].mean
    spread = None if score.sd is None else metric.plotted(score.sd)
    return [x, metric.plotted(score.mean), words, spread, group.runs[0].name if len(group.runs) == 1 else group.budget]


def text(spread: Spread, scale: float = 1.0, form: str = ".2f") -> str:
    """Return mean ± standard deviation.

    Example:
        >>> text(Spread(0.5, 0.01, 3), 100), text(Spread(2.0, None, 1))
        ('50.00 ± 1.00', '2.00')
    """
    return f"{scale * spread.mean:{form}}" + ("" if spread.sd is None else f" ± {scale * spread.sd:{form}}")


def score_text(group: Group, name: str = "score") -> str:
    """Return the score of a group, or its change, in the unit of its metric; a dash where nobody measured it."""
    spread, metric = group.values.get(name), group.metric
    return "—" if spread is None else text(spread, metric.plotted(1.0), ".2f" if metric.percent else ".4g")


def _table(groups: Sequence[Group]) -> tuple[list[Column], list[Row]]:
    shown = [name for name in _SHOWN if any(name in group.values for group in groups)]
    columns = [Column("model"), Column("method", css="why"), Column("budget", css="kind"), Column("runs", numeric=True)]
    columns += [Column(_SHOWN[name], numeric=True) for name in shown]
    scored = any("score" in group.values for group in groups)
    columns += [Column(score_head(groups), numeric=True)] if scored else []
    changed = any("change" in group.values for group in groups)
    columns += (
        [Column("points" if all(g.metric.percent for g in groups) else "change", numeric=True)] if changed else []
    )
    front = best(groups) if len(groups) > 1 else set()
    rows = []
    for group in groups:
        cells = [Cell(group.model), Cell(group.method), Cell(group.budget), Cell(str(len(group.runs)), len(group.runs))]
        cells += [_cell(group, name, 1.0 if name == "speedup" else 100.0) for name in shown]
        for name in ("score",) * scored + ("change",) * changed:
            spread = group.values.get(name)
            shown_as = score_text(group, name).replace("-", "−")
            cells.append(Cell("—") if spread is None else Cell(shown_as, spread.mean))
        if group in front:
            cells[1] = Cell(group.method, badge="", note="★ best at its cost")
        rows.append(Row(tuple(cells)))
    return columns, rows


def _cell(group: Group, name: str, scale: float) -> Any:
    spread = group.values.get(name)
    return Cell("—") if spread is None else Cell(text(spread, scale), spread.mean)
