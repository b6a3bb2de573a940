"""tenfold tune: train a compressed model on."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tenfold.cli.options import Machine, Source, Training
from tenfold.cli.terminal import Misuse, Terminal

if TYPE_CHECKING:
    from tenfold.cli.recovering import Tuner
    from tenfold.cli.sources import Opened
    from tenfold.records import Plan, RunRecord
    from tenfold.training import TuneResult

ORDER = 40
LAUNCHABLE = True  # in several processes, which tune together

Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="FOLDER", help="Where to write the tuned model.", rich_help_panel="Output"),
]

TeacherFile = Annotated[
    Path | None,
    typer.Option(
        "--teacher",
        metavar="FILE",
        help="Weights (.safetensors) of the dense model that teaches; needed with --distill.",
        rich_help_panel="Recovery",
    ),
]

Epochs = Annotated[
    int | None,
    typer.Option(
        "--epochs",
        "--tune-epochs",
        min=1,
        metavar="N",
        help="Passes over the training set; by default what the task recommends.",
        rich_help_panel="Recovery",
        show_default=False,
    ),
]


def run(
    ctx: typer.Context,
    source: Source,
    training: Training,
    machine: Machine,
    terminal: Terminal,
    epochs: Epochs = None,
    teacher: TeacherFile = None,
    out: Out = None,
) -> None:
    """Train a compressed model on, and save it to another folder.

    tenfold tune --checkpoint half --epochs 10 --out half-tuned

    A run that was killed goes on after its last complete epoch when the same command is given again. Under
    `accelerate launch -m tenfold tune ...` all processes tune together, each with batches of its own.

    With --json, one object like that of `tenfold compress`; `scores` has `before tuning` and `tuned`.
    """
    if source.checkpoint is None or out is None:
        msg = "give the compressed model as --checkpoint FOLDER, and where to write the new one as --out FOLDER."
        raise Misuse(msg)
    if (teacher is None) != (training.distill is None):
        msg = "give --distill SHARE and --teacher FILE together: how much the dense model teaches, and its weights."
        raise Misuse(msg)
    with terminal.session():
        from tenfold.checkpoint import check_target, save
        from tenfold.cli.commands.compress import show_outcome
        from tenfold.cli.recovering import Teaching, Tuner, identity_of, tune_config
        from tenfold.cli.scaling import launched, on_own_device
        from tenfold.cli.sources import open_source, required_plan

        check_target(out)
        launch = launched(machine)
        terminal.step("open the model")
        opened = open_source(source, on_own_device(machine, launch))
        plan = required_plan(opened)
        config = tune_config(opened, training, epochs, machine.seed)
        teaching = None if training.distill is None else Teaching(training.distill, training.temperature)
        identity = identity_of(opened, teaching, "" if teacher is None else teacher.resolve())
        dense = None if teacher is None else opened.task.dense(teacher).to(opened.device)
        follows = launch is not None and not launch.main
        tuner = Tuner(
            opened,
            config,
            out,
            identity,
            quiet=terminal.quiet or follows,
            teaching=teaching,
            teacher=dense,
            launch=launch,
        )
        if follows:
            tuner(opened.model)
            return
        record = _tune(opened, plan, tuner, terminal)
        record = record.replace(command=ctx.obj, settings={**record.settings, "tuning": config.model_dump()})
        save(opened.model, plan, out, record=record, beside=partial(opened.task.write_beside, opened.model))
        tuner.clean()
        show_outcome(record, out, terminal)


def _tune(opened: Opened, plan: Plan, tuner: Tuner, terminal: Terminal) -> RunRecord:
    """Return the record of the model after tuning it in place."""
    start = time.perf_counter()
    terminal.step("evaluate")
    before = opened.task.evaluate(opened.model)
    terminal.step("tune")
    told = tuner(opened.model)
    terminal.step("evaluate")
    after = opened.task.evaluate(opened.model)
    return _record(opened, plan, told, (before, after), time.perf_counter() - start)


def _record(opened: Opened, plan: Plan, told: TuneResult, scores: tuple[float, float], seconds: float) -> RunRecord:
    """Return the record of the checkpoint with the tuning added; a new one where it has none."""
    from tenfold.pipeline import measurement
    from tenfold.profiling import environment, profile
    from tenfold.records import RunRecord

    before, after = scores
    now = measurement(profile(opened.model, opened.inputs()), score=after)
    old = opened.record or RunRecord(
        task=opened.name,
        seed=plan.seed,
        before=now.replace(score=before),
        after=now,
        plan=plan,
        environment=environment(opened.device),
    )
    kept = {name: value for name, value in old.scores.items() if name == "original"}
    return old.replace(
        after=old.after.replace(score=after),
        scores={**kept, "before tuning": before, "tuned": after},
        tuning=(*old.tuning, *(epoch.model_dump() for epoch in told.history)),
        seconds={**old.seconds, "tune again": seconds},
        environment=environment(opened.device),
    )
