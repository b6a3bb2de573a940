"""tenfold plan: decide, and do nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import NonNegativeInt, PositiveInt

from tenfold.cli.choices import RecipeOptions
from tenfold.cli.recovery import Recover
from tenfold.cli.scoring import Scoring
from tenfold.cli.source import Cluster, Source
from tenfold.cli.terminal import Misuse, Options, Terminal

if TYPE_CHECKING:
    from tenfold.records import OptionTable

ORDER = 20


class Work(Options):
    """Output.

    Attributes:
        plan: cost this plan again, edited or not, instead of making one.
        calibration_samples: training samples to look at, without labels; 0 for none. By default 2000 (128 sequences of
            a language model), or as many as there are.
        latency_batch_size: batch size that a latency budget is for.
        out: where to write the plan.
        plot: draw what other budgets would cost, this plan marked, as a PNG, with the numbers in a CSV beside it.
    """

    plan: Path | None = None
    calibration_samples: NonNegativeInt | None = None
    latency_batch_size: PositiveInt = 1
    out: Path | None = None
    plot: Path | None = None


def run(
    source: Source, recipe: RecipeOptions, scoring: Scoring, work: Work, machine: Cluster, terminal: Terminal
) -> None:
    """Decide what to do with each layer, as a YAML file that you can edit.

    tenfold plan --task digits --budget macs=0.5 --out plan.yaml --plot budgets.png

    Without --out the YAML goes to stdout. Edit ranks and actions, then: tenfold compress --plan plan.yaml ...
    Beside the file, unless another rule than global is used, lies what it chose from, for: tenfold explore plan.yaml
    """
    from tenfold.cli.choices import plan_or_recipe
    from tenfold.cli.scoring import draw_tradeoff
    from tenfold.cli.show import show_decision
    from tenfold.cli.source import open_source
    from tenfold.files import check_writable
    from tenfold.planning import decide
    from tenfold.records import Plan
    from tenfold.reporting.pictures import check_drawable
    from tenfold.runtime import Runtime

    if work.plot is not None and work.plan is not None:
        msg = "--plot shows what other budgets lead to, and --plan FILE has decided: leave one out."
        raise Misuse(msg)
    if work.plot is not None:
        check_drawable()
    out = work.out / "plan.yaml" if work.out is not None and work.out.is_dir() else work.out
    for file in filter(None, (out, work.plot, scoring.table)):
        check_writable(file)
    opened = open_source(source, machine, recipe.seed)
    wanted = plan_or_recipe(recipe, work.plan)
    data = Recover(calibration_samples=work.calibration_samples).batches(
        opened, wanted.recipe if isinstance(wanted, Plan) else wanted
    )
    terminal.step("open the model")
    workers = machine.workers(opened)
    scores = None if isinstance(wanted, Plan) else scoring.factory(opened, wanted, workers)
    runtime = Runtime(
        workers=workers,
        latency_inputs=opened.inputs(work.latency_batch_size),
        cache=None if scores is not None else scoring.table,
        on_event=terminal.on_event,
    )
    decision = decide(opened.model, opened.inputs(), wanted, data=data, scores=scores, runtime=runtime)
    plan, explored = decision.plan, False
    if out is not None:  # before anything is said: if it cannot be written, that is an error and nothing else
        plan.save(out)
        explored = _save_options(decision.table, out)
    if out is None and not terminal.as_json:
        terminal.say(plan.to_yaml().rstrip())
    else:
        show_decision(plan, opened, terminal, out=out)
    if out is not None:
        terminal.say(f"Written to {out}. Carry it out with: tenfold compress --plan {out} ...")
        if explored:
            terminal.say(f"Move budgets and layers by hand with: tenfold explore {out}")
    if work.plot is not None:
        terminal.step("other budgets")
        files = draw_tradeoff(decision, work.plot, terminal, scores)
        runtime.report("other budgets", note=f"drawn in {', '.join(map(str, files))}")  # stdout may be the plan


def _save_options(table: OptionTable | None, out: Path) -> bool:
    """Write what a plan chose from beside it, if it can be explored; what an earlier plan of that name did goes."""
    from tenfold.allocation import explorable, pruned
    from tenfold.explorer.table_files import options_file

    file = options_file(out)
    if table is None or not explorable(table):
        file.unlink(missing_ok=True)
        return False
    pruned(table).save(file)
    return True
