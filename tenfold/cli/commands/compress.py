"""tenfold compress: the main job."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

from pydantic import PositiveInt

from tenfold.cli.choices import RecipeOptions
from tenfold.cli.recovery import Recover, TuneOptions
from tenfold.cli.source import Cluster, Folder, Source
from tenfold.cli.terminal import Options, Terminal

ORDER = 30
LAUNCHABLE = True  # in several processes, which tune together


class Work(Options):
    """What is done.

    Attributes:
        plan: carry out this plan, edited or not, instead of making one.
        dry_run: decide and show the plan; write nothing.
        latency: measure milliseconds too.
        latency_batch_size: batch size to measure with, which a latency budget is for too.
        out: where to write the model, replacing an earlier checkpoint; compressed-TASK by default.
    """

    plan: Path | None = None
    dry_run: bool = False
    latency: bool = True
    latency_batch_size: PositiveInt = 1
    out: Folder = None


def run(
    source: Source,
    recipe: RecipeOptions,
    recover: Recover,
    tune: TuneOptions,
    work: Work,
    machine: Cluster,
    terminal: Terminal,
) -> None:
    """Make a trained model smaller: plan, apply, recover, measure, save.

    tenfold compress --task cifar10:resnet56 --weights resnet56.safetensors --budget macs=0.5 --out half

    Writes model.safetensors, plan.yaml, record.json and README.md to the folder --out. A run that was killed while
    refining blocks or tuning goes on where it was when the same command is given again. Under `accelerate launch -m
    tenfold compress ...` all processes tune together, each with batches of its own.

    With --json, one object: `before` and `after`, each with `params`, `macs`, `bytes`, `latency_ms`, `latency` and
    `score`; `metric`: what scores are, a fraction unless the task says otherwise; `speedup`; `scores` by step; `plan`;
    `tuning` by epoch; `seconds` by step; `environment`; `settings`; `task`; `command`; `seed`; `out`. What was not
    measured is null.
    """
    from tenfold.cli.choices import plan_or_recipe
    from tenfold.cli.launch import launched
    from tenfold.cli.recovery import Tuner, claim, forget_epochs, identity_of, tuning_folder
    from tenfold.cli.show import show_decision, show_outcome
    from tenfold.cli.source import open_source
    from tenfold.pipeline import carry_out
    from tenfold.planning import decide
    from tenfold.records import Plan
    from tenfold.runtime import Runtime

    teaching, launch = recover.teaching(), launched(machine)
    opened = open_source(source, launch.own(machine), recipe.seed)
    out = work.out or opened.default_folder
    if launch.main and not work.dry_run:
        claim(out, terminal)
    config = recover.config(opened, tune, recipe.seed)
    wanted = plan_or_recipe(recipe, work.plan)
    data = recover.batches(opened, wanted.recipe if isinstance(wanted, Plan) else wanted)
    terminal.step("open the model")
    identity = identity_of(opened, wanted.to_json(), recover.calibration_samples, teaching)
    on_event = terminal.on_event if launch.main else None
    tuner = Tuner(opened, config, out, identity, on_event=on_event, teaching=teaching, launch=launch)
    if not launch.main:  # all else is done by the main process
        if not work.dry_run and config.epochs:
            tuner(opened.model)
        return
    runtime = Runtime(
        workers=machine.workers(opened),
        measure=work.latency,
        latency_inputs=opened.inputs(work.latency_batch_size),
        folder=tuning_folder(out, identity),
        max_cache=recover.max_cache,
        on_event=terminal.on_event,
    )
    evaluate = None if work.dry_run else recover.evaluator(opened)
    decision = decide(opened.model, opened.inputs(), wanted, data=data, evaluate=evaluate, runtime=runtime)
    if work.dry_run:
        show_decision(decision.plan, opened, terminal)
        return
    recovery = tuner if config.epochs else None
    result = carry_out(opened.model, decision, tune=recovery, evaluate=evaluate, runtime=runtime)
    settings = {
        "calibration_samples": recover.calibration_samples,
        **tuner.settings,
        "processes": launch.processes,
        "latency_batch_size": work.latency_batch_size,
    }
    record = result.record.replace(task=opened.name, command=terminal.command, settings=settings)
    dataclasses.replace(result, record=record).save(out, beside=partial(opened.task.write_beside, result.model))
    forget_epochs(out)
    show_outcome(record, out, terminal)
