"""From options to measurements of what each layer minds, and to the trade-off of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tenfold.cli.sources import Opened
    from tenfold.cli.terminal import Terminal
    from tenfold.parallel import Workers
    from tenfold.planning import Sensitivity
    from tenfold.records import Plan, Profile

_PANEL = "Measurement"
DEFAULT_SAMPLES = 1000
DEFAULT_CALIBRATION = 256

Samples = Annotated[
    int,
    typer.Option(
        metavar="N",
        min=0,
        help="Score on so many labelled samples held out from training, or on all there are; 0 for no scores.",
        rich_help_panel=_PANEL,
    ),
]
Table = Annotated[
    Path | None,
    typer.Option(
        "--table",
        metavar="FILE",
        help="Take from there, and keep there, what was measured: scores, for rules that need them; fits, for error.",
        rich_help_panel=_PANEL,
    ),
]


@dataclass(frozen=True)
class Conditions:
    """Under which conditions to measure."""

    calibration: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Training samples, without labels, for the errors of outputs; 0 for the errors of weights.",
            rich_help_panel=_PANEL,
        ),
    ] = DEFAULT_CALIBRATION
    batchnorm: Annotated[
        bool,
        typer.Option(
            "--batchnorm/--no-batchnorm",
            help="Estimate batch norm anew on the calibration samples before every score.",
            rich_help_panel=_PANEL,
        ),
    ] = False


def open_sensitivity(
    opened: Opened,
    profile: Profile,
    conditions: Conditions,
    *,
    samples: int,
    formats: tuple[str, ...],
    keep: tuple[str, ...],
    seed: int,
    path: Path | None,
    workers: Workers | None = None,
) -> Sensitivity:
    """Return what measures the layers of a task's model, with what ``path`` holds already.

    Raises:
        TenfoldError: the file at ``path`` was measured under other conditions; a format or pattern that names nothing.
    """
    from tenfold.cli.recovering import Calibration
    from tenfold.planning import Sensitivity

    task = opened.task
    batches = None
    if conditions.calibration:
        there = task.calibration_size(seed)
        batches = Calibration(opened, min(conditions.calibration, there), seed)
    return Sensitivity(
        opened.model,
        profile,
        formats=formats,
        evaluate=(lambda model: task.evaluate(model, split="validation", limit=samples)) if samples else None,
        calibration=batches,
        batchnorm=conditions.batchnorm,
        keep=keep,
        seed=seed,
        about={"task": opened.name, "scored": samples} if samples else None,
        path=path,
        workers=workers,
    )


def with_scores(
    choices: dict[str, Any],
    opened: Opened,
    profile: Profile,
    *,
    samples: int,
    seed: int,
    table: Path | None,
    workers: Workers | None = None,
) -> dict[str, Any]:
    """Return the choices with scores of the task's model for the rule to weigh, if it asks for them and can have them.

    The rule accuracy_drop always asks for them, the rule global where a table is given. A table that exists decides
    under which conditions more is measured.
    """
    from tenfold.ranks.accuracy_drop import AccuracyDrop
    from tenfold.records import SensitivityTable

    rule = choices["rule"]
    if not isinstance(rule, AccuracyDrop) and not (rule.by_damage and table is not None):
        return choices
    conditions = Conditions()
    if table is not None and table.exists():
        key = SensitivityTable.load(table).key
        conditions = Conditions(key.samples, key.batchnorm)
        samples = int(key.about.get("scored") or samples)
    if not samples:
        return choices
    formats = choices["formats"]
    scores = open_sensitivity(
        opened, profile, conditions, samples=samples, formats=formats, keep=(), seed=seed, path=table, workers=workers
    )
    if isinstance(rule, AccuracyDrop):
        return choices | {"rule": dataclasses.replace(rule, scores=scores)}
    return choices | {"damages": scores.damage_at}


def draw_tradeoff(
    opened: Opened, profile: Profile, choices: Mapping[str, Any], plan: Plan, path: Path, terminal: Terminal
) -> tuple[Path, ...]:
    """Write the trade-off curve of the rule with the plan marked, and return the files written."""
    from tenfold.planning import plan as make_plan
    from tenfold.planning import tradeoff
    from tenfold.ranks import OneKnobRule
    from tenfold.reporting.pictures import plot_tradeoff

    if isinstance(rule := choices["rule"], OneKnobRule):
        choices = {**choices, "rule": rule.without_number()}

    budget = next((name for name in plan.budget if name != "latency"), "macs")
    with bar(terminal, "budgets") as advance:
        curve = tradeoff(
            opened.model,
            profile,
            lambda wanted: make_plan(opened.model, profile, **{**choices, "budget": wanted}),
            budget=budget,
            progress=advance,
        )
    return plot_tradeoff(curve, path, cost=plan.after)


@contextmanager
def watched(choices: dict[str, Any], terminal: Terminal, *, table: Path | None = None) -> Iterator[dict[str, Any]]:
    """Yield the choices with a bar for a rule that tells how far it is, and with the table it keeps its fits in."""
    from tenfold.ranks.error_bound import ErrorBound

    rule = choices.get("rule")
    if not isinstance(rule, ErrorBound):
        yield choices
        return
    with bar(terminal, "ranks, layer by layer") as advance:
        yield choices | {"rule": dataclasses.replace(rule, progress=advance, table=rule.table or table)}


@contextmanager
def bar(terminal: Terminal, name: str) -> Iterator[Callable[[int, int], None]]:
    """Yield what to call with (done, in all): a progress bar on stderr if somebody watches, else nothing.

    It is there from the first call to the last, so that other bars may come before and after it.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    shown = Progress(*columns, console=console, transient=True, disable=terminal.quiet or not console.is_terminal)
    job = shown.add_task(name, total=None)

    def advance(done: int, total: int) -> None:
        if done < total:
            shown.start()
        shown.update(job, completed=done, total=total)
        if done >= total:
            shown.stop()

    try:
        yield advance
    finally:
        shown.stop()
