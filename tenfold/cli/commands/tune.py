"""tenfold tune: train a compressed model on."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tenfold.cli.recovery import Distill, TuneOptions
from tenfold.cli.source import Folder, Machine, Source
from tenfold.cli.terminal import Misuse, Options, Terminal

if TYPE_CHECKING:
    from tenfold.cli.recovery import Tuner
    from tenfold.cli.source import Opened
    from tenfold.records import RunRecord, TuneResult

ORDER = 40
LAUNCHABLE = True  # in several processes, which tune together


class Output(Options):
    """Output.

    Attributes:
        teacher: weights (.safetensors) of the dense model that teaches; needed with --distill.
        out: where to write the tuned model.
    """

    teacher: Path | None = None
    out: Folder = None


def run(
    source: Source,
    tune: TuneOptions,
    distill: Distill,
    output: Output,
    machine: Machine,
    terminal: Terminal,
) -> None:
    """Train a compressed model on, and save it to another folder.

    tenfold tune --checkpoint half --epochs 10 --out half-tuned

    A run that was killed goes on after its last complete epoch when the same command is given again. Under
    `accelerate launch -m tenfold tune ...` all processes tune together, each with batches of its own.

    With --json, one object like that of `tenfold compress`; `scores` has `before tuning` and `tuned`.
    """
    if source.checkpoint is None or output.out is None:
        msg = "give the compressed model as --checkpoint FOLDER, and where to write the new one as --out FOLDER."
        raise Misuse(msg)
    if (output.teacher is None) != (distill.distill is None):
        msg = "give --distill SHARE and --teacher FILE together: how much the dense model teaches, and its weights."
        raise Misuse(msg)
    from tenfold.checkpoint import save
    from tenfold.cli.launch import launched
    from tenfold.cli.recovery import Tuner, claim, forget_epochs, identity_of, tune_config
    from tenfold.cli.show import show_outcome
    from tenfold.cli.source import open_source

    out, teacher, teaching = output.out, output.teacher, distill.teaching()
    launch = launched(machine)
    if launch.main:
        claim(out, terminal)
    opened = open_source(source, launch.own(machine), tune.seed)
    config = tune_config(opened, tune, tune.seed)
    terminal.step("open the model")
    plan = opened.plan
    tuner = Tuner(
        opened,
        config,
        out,
        identity_of(opened, teaching, "" if teacher is None else teacher.resolve()),
        on_event=terminal.on_event if launch.main else None,
        teaching=teaching,
        teacher=None if teacher is None else opened.task.dense(teacher).to(opened.device),
        launch=launch,
    )
    if not launch.main:
        tuner(opened.model)
        return
    record = _tune(opened, tuner, terminal)
    record = record.replace(command=terminal.command, settings={**record.settings, "tuning": config.model_dump()})
    save(opened.model, plan, out, record=record, beside=partial(opened.task.write_beside, opened.model))
    forget_epochs(out)
    show_outcome(record, out, terminal)


def _tune(opened: Opened, tuner: Tuner, terminal: Terminal) -> RunRecord:
    """Return the record of the model after tuning it in place."""
    start = time.perf_counter()
    terminal.step("evaluate")
    before = opened.score.of_original(opened.model)
    terminal.step("tune")
    result = tuner(opened.model)
    terminal.step("evaluate")
    after = opened.score(opened.model)
    return _record(opened, result, (before, after), time.perf_counter() - start)


def _record(opened: Opened, result: TuneResult, scores: tuple[float, float], seconds: float) -> RunRecord:
    """Return the record of the checkpoint with the tuning added; a new one where it has none."""
    from tenfold.pipeline import measurement
    from tenfold.profiling import environment, profile
    from tenfold.records import RunRecord

    before, after = scores
    now = measurement(profile(opened.model, opened.inputs()), score=after)
    old = opened.record or RunRecord(
        task=opened.name,
        seed=opened.plan.seed,
        before=now.replace(score=before),
        after=now,
        metric=opened.task.metric,
        plan=opened.plan,
        environment=environment(opened.device),
    )
    same = old.metric == opened.task.metric
    kept = {name: value for name, value in old.scores.items() if name == "original" and same}
    return old.replace(
        after=old.after.replace(score=after),
        before=old.before if same else old.before.replace(score=None),
        scores={**kept, "before tuning": before, "tuned": after},
        metric=opened.task.metric,
        tuning=(*old.tuning, *(epoch.model_dump() for epoch in result.history)),
        seconds={**old.seconds, "tune again": seconds},
        environment=environment(opened.device),
    )
