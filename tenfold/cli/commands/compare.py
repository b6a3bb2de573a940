"""tenfold compare: many runs side by side."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from tenfold.cli.terminal import Misuse, Terminal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from tenfold.reporting.comparison import Group

ORDER = 51

ENDS = (".html", ".csv", ".tex")


def run(runs: list[Path], /, terminal: Terminal, *, out: tuple[Path, ...] = ()) -> None:
    """Compare runs: methods by budgets, mean and standard deviation over seeds.

    tenfold compare runs/* --out comparison.html --out table.tex

    Runs that differ in nothing but their seed are one row. The page has score against cost and a table that can be
    sorted; the LaTeX table wants the package booktabs.

    With --json, a list: each group with `model`, `method`, `budget`, `seeds`, `runs`, `metric`, and `values`: `mean`,
    `sd` and `count` of `params`, `macs` (shares of the model before), `speedup`, `score` and its `change`.

    Args:
        runs: folders that tenfold wrote, or JSON files with records inside.
        terminal: what to show.
        out: where to write the comparison: .html, .csv or .tex. Repeatable.
    """
    from tenfold.files import check_writable, write_text
    from tenfold.reporting.comparison import compare
    from tenfold.reporting.comparison_page import write_comparison
    from tenfold.reporting.run_files import read_runs
    from tenfold.reporting.tabular import as_csv, as_latex

    wrong = [str(file) for file in out if file.suffix.lower() not in ENDS]
    if wrong:
        msg = f"--out {wrong[0]}: a comparison is written as {', '.join(ENDS)}."
        raise Misuse(msg)
    for file in out:
        check_writable(file)
    groups = compare([found for path in runs for found in read_runs(path)])
    for file in out:
        if file.suffix.lower() == ".html":
            write_comparison(groups, file)
        else:
            write_text(file, as_csv(groups) if file.suffix.lower() == ".csv" else as_latex(groups))
    terminal.show(_table(groups))
    for file in out:
        terminal.say(f"Written to {file}")
    terminal.result([_plain(group) for group in groups])


def _table(groups: Sequence[Group]) -> Table:
    from tenfold.reporting.comparison import score_head
    from tenfold.reporting.comparison_page import score_text, text
    from tenfold.reporting.table_parts import grid

    table = grid()
    for name in ("model", "method", "budget"):
        table.add_column(name)
    shown = {"macs": 100.0, "params": 100.0, "speedup": 1.0}
    heads = {"macs": "MACs %", "params": "params %", "speedup": "times faster"}
    for name in ("runs", *heads.values(), score_head(groups).replace(" (%)", " %")):
        table.add_column(name, justify="right", no_wrap=True)
    for group in groups:
        spreads = [text(group.values[k], v) if k in group.values else "—" for k, v in shown.items()]
        table.add_row(group.model, group.method, group.budget, str(len(group.runs)), *spreads, score_text(group))
    return table


def _plain(group: Group) -> dict[str, object]:
    values = {name: dataclasses.asdict(spread) for name, spread in group.values.items()}
    names = [run.name for run in group.runs]
    metric = group.metric.model_dump(mode="json")
    same = {"model": group.model, "method": group.method, "budget": group.budget}
    return {**same, "seeds": list(group.seeds), "runs": names, "metric": metric, "values": values}
