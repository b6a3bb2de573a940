"""tenfold plan: decide, and do nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tenfold.cli.options import Data, Decide, Machine, Source
from tenfold.cli.scaling import Spread
from tenfold.cli.sensing import DEFAULT_SAMPLES, Samples, Table
from tenfold.cli.terminal import Misuse, Terminal

if TYPE_CHECKING:
    from tenfold.records import Candidates

ORDER = 20

Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="FILE", help="Where to write the plan.", rich_help_panel="Output"),
]


LatencyBatch = Annotated[int, typer.Option(min=1, metavar="N", help="Batch size that a latency budget is for.")]
Plot = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Draw what other budgets would cost, this plan marked, as a PNG, with the numbers in a CSV beside it.",
        rich_help_panel="Output",
    ),
]


def run(  # noqa: PLR0913, PLR0917 - one argument for each group of options
    source: Source,
    decide: Decide,
    data: Data,
    machine: Machine,
    spread: Spread,
    terminal: Terminal,
    latency_batch: LatencyBatch = 1,
    samples: Samples = DEFAULT_SAMPLES,
    table: Table = None,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Decide what to do with each layer, as a YAML file that you can edit.

    tenfold plan --task digits --budget macs=0.5 --out plan.yaml --plot budgets.png

    Without --out the YAML goes to stdout. Edit ranks and actions, then: tenfold compress --plan plan.yaml ...
    Beside the file, unless another rule than global is used, lies what it chose from, for: tenfold explore plan.yaml
    """
    with terminal.session():
        from tenfold.cli.commands.compress import show_decision
        from tenfold.cli.deciding import decided, open_networks, plan_choices, with_data
        from tenfold.cli.sensing import draw_tradeoff, watched, with_scores
        from tenfold.cli.sources import open_source
        from tenfold.profiling import profile

        if plot is not None and decide.plan is not None:
            msg = "--plot shows what other budgets lead to, and --plan FILE has decided: leave one out."
            raise Misuse(msg)
        terminal.step("open the model")
        opened = open_networks(decide, open_source(source, machine))
        cost = profile(opened.model, opened.inputs())
        choices: dict[str, Any] = {}
        if decide.plan is None:
            workers = spread.workers(opened, machine)
            choices = plan_choices(decide, machine.seed) | {"workers": workers, "memory": {}}
            choices = with_scores(
                choices, opened, cost, samples=samples, seed=machine.seed, table=table, workers=workers
            )
            choices = with_data(choices, opened, cost, data, machine.seed)
        with watched(choices, terminal, table=table) as told:
            plan, candidates = decided(decide, opened, cost, told, latency_batch=latency_batch)
        if out is not None:  # before anything is said: if it cannot be written, that is an error and nothing else
            out = out / "plan.yaml" if out.is_dir() else out
            plan.save(out)
            found = candidates()
            _save_candidates(found, out)
        if out is None and not terminal.json:
            terminal.say(plan.to_yaml().rstrip())
        else:
            show_decision(plan, opened, terminal, out=out)
        if out is not None:
            terminal.say(f"Written to {out}. Carry it out with: tenfold compress --plan {out} ...")
            if found is not None:
                terminal.say(f"Move budgets and layers by hand with: tenfold explore {out}")
        if plot is not None:
            terminal.step("other budgets")
            files = draw_tradeoff(opened, cost, choices, plan, plot, terminal)
            if out is not None:
                terminal.say(f"Drawn in {', '.join(map(str, files))}")


def _save_candidates(candidates: Candidates | None, out: Path) -> None:
    """Write what a plan chose from beside it; what an earlier plan of that name did goes."""
    from tenfold.explorer.table_files import candidates_file

    file = candidates_file(out)
    if candidates is None:
        file.unlink(missing_ok=True)
    else:
        candidates.save(file)
