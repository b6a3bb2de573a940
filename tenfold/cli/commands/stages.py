"""tenfold stages: compress a little, tune, and again."""

from __future__ import annotations

import dataclasses
import logging
from functools import partial
from typing import TYPE_CHECKING, Annotated

from tenfold.allocation import Schedule
from tenfold.cli.choices import RecipeOptions
from tenfold.cli.record_options import Fields
from tenfold.cli.recovery import Recover, TuneOptions
from tenfold.cli.source import Folder, Machine, Source
from tenfold.cli.terminal import Options, Terminal

if TYPE_CHECKING:
    from tenfold.cli.source import Opened
    from tenfold.iterative import Stage
    from tenfold.pipeline import Compressed

ORDER = 35


class Output(Options):
    """Output.

    Attributes:
        out: where to write the model, replacing an earlier checkpoint; compressed-TASK by default.
        run: where to keep the stages, each a checkpoint; OUT.stages by default.
    """

    out: Folder = None
    run: Folder = None


def run(
    source: Source,
    recipe: RecipeOptions,
    schedule: Annotated[Schedule, Fields("Schedule", without=("rules",), file=True)],
    recover: Recover,
    tune: TuneOptions,
    machine: Machine,
    output: Output,
    terminal: Terminal,
) -> None:
    """Make a trained model smaller in stages, with tuning after each: compress a little, tune, and again.

    tenfold stages --task cifar10:resnet56 --weights resnet56.safetensors --budget macs=0.38 --rounds 3 --epochs 20

    Every stage is a checkpoint in the folder --run as soon as it is complete, and the file `latest` there names the
    last one. Killed at any moment, the same command goes on to the same end: in the middle of a stage after its last
    complete epoch.

    With --json, one object like that of `tenfold compress`, with `stages`: one entry for each, with `round`, `limits`,
    `before`, `after`, `layers` with their ranks, `scores`, `tuning` by epoch, `seconds`.
    """
    from tenfold.cli.choices import plan_or_recipe
    from tenfold.cli.recovery import Tuner, claim
    from tenfold.cli.show import show_outcome
    from tenfold.cli.source import open_source
    from tenfold.files import check_writable
    from tenfold.iterative import Training, compress_iteratively
    from tenfold.runtime import Runtime
    from tenfold.training import TuneEvents

    teaching = recover.teaching()
    schedule.check(recipe)
    opened = open_source(source, machine, recipe.seed)
    out = output.out or opened.default_folder
    claim(out, terminal)
    folder = output.run or out.with_name(f"{out.name}.stages")
    check_writable(folder / "run.json")
    config = recover.config(opened, tune, recipe.seed)
    plan_or_recipe(recipe, None)
    if "epochs" not in schedule.model_fields_set or not recover.tune:
        schedule = schedule.replace(epochs=config.epochs)
    data = recover.batches(opened, recipe)
    terminal.step("open the model")
    tuner = Tuner(opened, config, out, "", teaching=teaching)
    progress = TuneEvents(terminal.on_event)
    try:
        result = compress_iteratively(
            opened.model,
            opened.inputs(),
            recipe,
            schedule,
            tune=Training(tuner.batches, config, tuner.loss, progress, partial(_announce, schedule)),
            data=data,
            evaluate=recover.evaluator(opened),
            runtime=Runtime(
                folder=folder,
                identity=f"{opened.name} {teaching or ''}".strip(),
                max_cache=recover.max_cache,
                on_event=terminal.on_event,
            ),
        )
    except KeyboardInterrupt:
        msg = f"interrupted; the same command goes on where it was, from {folder}"
        raise KeyboardInterrupt(msg) from None
    result = _fused(result, opened) if recipe.fuse_batchnorm else result
    samples = {"calibration_samples": recover.calibration_samples}
    settings = {**result.record.settings, **samples, **tuner.settings, "tuning": config.model_dump()}
    record = result.record.replace(task=opened.name, command=terminal.command, settings=settings)
    dataclasses.replace(result, record=record).save(out, beside=partial(opened.task.write_beside, result.model))
    show_outcome(record, out, terminal)


def _fused(result: Compressed, opened: Opened) -> Compressed:
    """Return the outcome with batch norm fused into the layers: at the end, since what is fused cannot be tuned."""
    from tenfold.pipeline import measurement
    from tenfold.profiling import profile
    from tenfold.surgery import fuse_batchnorm_, fused_pairs

    small = result.model.eval()
    fuse_batchnorm_(small, opened.inputs())
    plan = result.plan.replace(fused=fused_pairs(small))
    after = measurement(profile(small, opened.inputs()), score=result.record.after.score)
    return dataclasses.replace(result, model=small, plan=plan, record=result.record.replace(plan=plan, after=after))


def _announce(schedule: Schedule, stage: Stage) -> None:
    before, after = stage.record.before, stage.record.after
    what = "training only" if stage.final else f"{len(stage.record.layers)} layers, round {stage.record.round}"
    total = f" of {schedule.rounds}" if not stage.final else ""
    message = "stage %d (%s%s): %s to %s MACs, %d epochs"
    logging.getLogger("tenfold").info(
        message, stage.index, what, total, f"{before.macs:,}", f"{after.macs:,}", stage.epochs
    )
