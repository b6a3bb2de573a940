"""tenfold compress: the main job."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tenfold.cli.options import Data, Decide, Machine, Recover, Source, Timing, Training, Writing
from tenfold.cli.scaling import Launch, Spread
from tenfold.cli.terminal import Terminal

if TYPE_CHECKING:
    from tenfold.cli.recovering import Tuner
    from tenfold.cli.sources import Opened
    from tenfold.parallel import Workers
    from tenfold.pipeline import Compressed
    from tenfold.records import Plan, RunRecord

ORDER = 30
LAUNCHABLE = True  # in several processes, which tune together


def run(  # noqa: PLR0913, PLR0917 - one argument for each group of options
    ctx: typer.Context,
    source: Source,
    decide: Decide,
    data: Data,
    recover: Recover,
    training: Training,
    timing: Timing,
    machine: Machine,
    spread: Spread,
    writing: Writing,
    terminal: Terminal,
) -> None:
    """Make a trained model smaller: plan, apply, recover, measure, save.

    tenfold compress --task cifar10:resnet56 --weights resnet56.safetensors --budget macs=0.5 --out half

    Writes model.safetensors, plan.yaml, record.json and README.md to the folder --out. A run that was killed while
    tuning goes on where it was when the same command is given again. Under `accelerate launch -m tenfold compress ...`
    all processes tune together, each with batches of its own.

    With --json, one object: `before` and `after`, each with `params`, `macs`, `bytes`, `latency_ms`, `latency` and
    `score` (a fraction); `speedup`; `scores` by step; `plan`; `tuning` by epoch; `seconds` by step; `environment`;
    `settings`; `task`; `command`; `seed`; `out`. What was not measured is null.
    """
    with terminal.session():
        from tenfold.cli.recovering import wanted_epochs
        from tenfold.cli.scaling import launched, on_own_device
        from tenfold.cli.sources import default_folder, open_source

        epochs = wanted_epochs(recover)
        launch = launched(machine)
        terminal.step("open the model")
        opened = open_source(source, on_own_device(machine, launch))
        workers = spread.workers(opened, machine)
        out = writing.out or default_folder(opened)
        job = _Job(opened, decide, data, recover, training, timing, machine.seed, out, epochs, workers, launch)
        if launch is not None and not launch.main:
            if not writing.dry_run:
                job.follow()
            return
        if writing.dry_run:
            _decide_only(opened, decide, data, timing, machine.seed, terminal)
            return
        result, tuner = job.run(terminal)
        record = result.record.replace(task=opened.name, command=ctx.obj, settings=job.settings(tuner))
        beside = functools.partial(opened.task.write_beside, result.model)
        dataclasses.replace(result, record=record).save(out, beside=beside)
        if tuner is not None:
            tuner.clean()
        show_outcome(record, out, terminal)


@dataclasses.dataclass(frozen=True, eq=False)
class _Job:
    """What is to be done, all options read."""

    opened: Opened
    decide: Decide
    data: Data
    recover: Recover
    training: Training
    timing: Timing
    seed: int
    out: Path
    epochs: int | None
    workers: Workers | None = None
    launch: Launch | None = None

    def follow(self) -> None:
        """Tune with the main process, which does all the rest."""
        tuner = self._tuner(Terminal(quiet=True))
        if tuner is not None:
            tuner(self.opened.model)

    def run(self, terminal: Terminal) -> tuple[Compressed, Tuner | None]:
        """Return the outcome, not yet saved, and what tuned it."""
        from tenfold.checkpoint import check_target
        from tenfold.cli.deciding import plan_choices, refuse_choices
        from tenfold.cli.recovering import calibration, evaluator
        from tenfold.cli.sensing import watched
        from tenfold.pipeline import compress
        from tenfold.records import Plan

        check_target(self.out)  # now, and not after hours of tuning
        plan, choices = None, {}
        if self.decide.plan is not None:
            refuse_choices(self.decide)
            plan = Plan.load(self.decide.plan)
        else:
            choices = plan_choices(self.decide, self.seed)
        tuner = self._tuner(terminal)
        with watched(choices, terminal) as told:
            result = compress(
                self.opened.model,
                self.opened.inputs(),
                plan=plan,
                data=calibration(self.opened, self.data, self.seed),
                use_data=self.data.use_data,
                tune=tuner,
                evaluate=evaluator(self.opened, self.recover),
                fold=self.decide.fold,
                latency=self.timing.latency,
                latency_inputs=self.opened.inputs(self.timing.latency_batch),
                workers=self.workers,
                observe=terminal.step,
                **told,
            )
        return result, tuner

    def settings(self, tuner: Tuner | None) -> dict[str, Any]:
        """Return what the record should say besides the plan."""
        return {
            "calibration": self.data.calibration,
            "use_data": self.data.use_data,
            "tuning": None if tuner is None else tuner.config.model_dump(),
            "processes": 1 if self.launch is None else self.launch.accelerator.num_processes,
            "distillation": None if tuner is None or not tuner.teaching else dataclasses.asdict(tuner.teaching),
            "latency_batch": self.timing.latency_batch,
        }

    def _tuner(self, terminal: Terminal) -> Tuner | None:
        from tenfold.cli.recovering import Teaching, Tuner, identity_of, tune_config

        free = self.recover.label_free
        config = tune_config(self.opened, self.training, self.epochs, self.seed, label_free=free)
        if config.epochs == 0:
            return None
        if not self.opened.task.labelled and not free:
            self.opened.task.train_batches(0, batch_size=1, seed=self.seed)  # says why not: now, not after the rest
        plan = self.decide.plan.read_bytes() if self.decide.plan is not None and self.decide.plan.is_file() else b""
        teaching = Teaching.of(self.recover, self.training, self.data)
        looked_at = (self.data.calibration, self.data.use_data, teaching)
        identity = identity_of(self.opened, self.decide, plan, looked_at, self.seed)
        launch = self.launch
        return Tuner(self.opened, config, self.out, identity, quiet=terminal.quiet, teaching=teaching, launch=launch)


def _decide_only(opened: Opened, decide: Decide, data: Data, timing: Timing, seed: int, terminal: Terminal) -> None:
    from tenfold.cli.deciding import open_networks, plan_choices, plan_of, with_data
    from tenfold.cli.sensing import watched
    from tenfold.profiling import profile

    opened = open_networks(decide, opened)
    cost = profile(opened.model, opened.inputs())
    choices = {} if decide.plan is not None else with_data(plan_choices(decide, seed), opened, cost, data, seed)
    with watched(choices, terminal) as told:
        plan = plan_of(decide, opened, cost, told, latency_batch=timing.latency_batch)
    show_decision(plan, opened, terminal)


def show_decision(plan: Plan, opened: Opened, terminal: Terminal, *, out: Path | None = None) -> None:
    """Show a plan that is not carried out; ``out`` is where it was written."""
    from tenfold.profiling import environment
    from tenfold.records import Measurement, RunRecord
    from tenfold.reporting import plan_tables

    record = RunRecord(
        task=opened.name,
        seed=plan.seed,
        before=Measurement(**plan.before.model_dump()),
        after=Measurement(**plan.after.model_dump()),
        plan=plan,
        environment=environment(opened.device),
    )
    terminal.show(*plan_tables(plan))
    terminal.result(record.model_dump(mode="json") | {"out": None if out is None else str(out)})


def show_outcome(record: RunRecord, out: Path, terminal: Terminal) -> None:
    """Show the tables and where the files are."""
    from tenfold.reporting import record_tables

    terminal.show(*record_tables(record))
    terminal.say(f"Saved in {out}: {', '.join(sorted(p.name for p in out.iterdir()))}")
    terminal.result(record.model_dump(mode="json") | {"out": str(out)})
