"""tenfold stages: compress a little, tune, and again."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tenfold.cli.options import Data, Decide, Machine, Recover, Source, Training
from tenfold.cli.terminal import Misuse, Terminal

if TYPE_CHECKING:
    from tenfold.cli.recovering import Teaching
    from tenfold.cli.sources import Opened
    from tenfold.iterative import Schedule, Stage
    from tenfold.pipeline import Compressed
    from tenfold.training import TuneConfig

ORDER = 35
_PANEL = "Stages"


@dataclass(frozen=True)
class Staging:
    """In how many stages, how far in each, and where they are kept."""

    stages: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="How often each layer is visited; the number of stages without --layers-per-stage.",
            rich_help_panel=_PANEL,
        ),
    ] = 3
    path: Annotated[
        Literal["geometric", "linear", "rule"],
        typer.Option(
            help="How the budget is approached: each stage takes the same share of what is left, or as much as the "
            "others, or what the rule says until the budget is met.",
            rich_help_panel=_PANEL,
        ),
    ] = "geometric"
    layers_per_stage: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="K",
            help="Layers to compress between two trainings; all of them, each a little, if left out.",
            rich_help_panel=_PANEL,
            show_default=False,
        ),
    ] = None
    order: Annotated[
        Literal["front", "back", "cost"],
        typer.Option(help="Which layers come first, with --layers-per-stage.", rich_help_panel=_PANEL),
    ] = "front"
    final_epochs: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="Epochs of training on after the last stage.", rich_help_panel=_PANEL),
    ] = 0
    fit_to: Annotated[
        Literal["current", "original"],
        typer.Option(
            help="Whose outputs the fits of later stages are to meet: those as tuned last, or the dense model's.",
            rich_help_panel=_PANEL,
        ),
    ] = "current"
    schedule: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="All of this from a YAML file, budget, rule and epochs too.", rich_help_panel=_PANEL
        ),
    ] = None


Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        metavar="FOLDER",
        help="Where to write the model, replacing an earlier checkpoint. Default: compressed-TASK.",
        rich_help_panel="Output",
        show_default=False,
    ),
]

RunFolderOption = Annotated[
    Path | None,
    typer.Option(
        "--run",
        metavar="FOLDER",
        help="Where to keep the stages, each a checkpoint. Default: OUT.stages.",
        rich_help_panel="Output",
        show_default=False,
    ),
]


def run(  # noqa: PLR0913, PLR0917 - groups of options
    ctx: typer.Context,
    source: Source,
    staging: Staging,
    decide: Decide,
    data: Data,
    recover: Recover,
    training: Training,
    machine: Machine,
    terminal: Terminal,
    out: Out = None,
    run: RunFolderOption = None,
) -> None:
    """Make a trained model smaller in stages, with tuning after each: compress a little, tune, and again.

    tenfold stages --task cifar10:resnet56 --weights resnet56.safetensors --budget macs=0.38 --stages 3 --tune-epochs 20

    Every stage is a checkpoint in the folder --run as soon as it is complete, and the file `latest` there names the
    last one. Killed at any moment, the same command goes on to the same end: in the middle of a stage after its last
    complete epoch.

    With --json, one object like that of `tenfold compress`, with `stages`: one entry for each, with `round`, `limits`,
    `before`, `after`, `layers` with their ranks, `scores`, `tuning` by epoch, `seconds`.
    """
    with terminal.session():
        from tenfold.checkpoint import check_target
        from tenfold.cli.commands.compress import show_outcome
        from tenfold.cli.deciding import algorithms_of
        from tenfold.cli.recovering import Teaching, tune_config, wanted_epochs
        from tenfold.cli.sources import default_folder, open_source

        if decide.plan is not None:
            msg = "--plan decides one step; stages make a plan each. Leave it out, or use `tenfold compress`."
            raise Misuse(msg)
        epochs = wanted_epochs(recover)
        schedule = None if staging.schedule is None else _read(staging, decide, epochs)
        terminal.step("open the model")
        opened = open_source(source, machine)
        out = out or default_folder(opened)
        check_target(out)
        asked = epochs if schedule is None else schedule.epochs
        config = tune_config(opened, training, asked, machine.seed, label_free=recover.label_free)
        schedule = schedule or _schedule(staging, decide, config.epochs, machine.seed)
        teaching = Teaching.of(recover, training, data)
        folder = run or out.with_name(f"{out.name}.stages")
        algorithms = algorithms_of(decide.algorithm, schedule.formats, machine.seed)
        choices = {"fit_to": staging.fit_to, "algorithms": algorithms}
        job = _Job(opened, schedule, data, recover, config, teaching, choices, folder, machine.seed)
        result = job.run(terminal)
        result = _folded(result, opened) if decide.fold else result
        record = result.record.replace(task=opened.name, command=ctx.obj, settings=job.settings(result))
        beside = partial(opened.task.write_beside, result.model)
        dataclasses.replace(result, record=record).save(out, beside=beside)
        show_outcome(record, out, terminal)


@dataclass(frozen=True, eq=False)
class _Job:
    """What is to be done, all options read."""

    opened: Opened
    schedule: Schedule
    data: Data
    recover: Recover
    config: TuneConfig
    teaching: Teaching | None
    choices: dict[str, Any]
    folder: Path
    seed: int

    def run(self, terminal: Terminal) -> Compressed:
        """Return the outcome, not yet saved."""
        from tenfold.cli.recovering import calibration, evaluator
        from tenfold.iterative import run_stages
        from tenfold.training import RichProgress

        task, opened, config = self.opened.task, self.opened, self.config
        size, seed = config.batch_size, config.seed
        batches: Any = partial(task.train_batches, batch_size=size, seed=seed)
        if self.teaching is not None and self.teaching.samples is not None:
            batches = partial(task.unlabeled_batches, samples=self.teaching.samples, batch_size=size, seed=seed)
        try:
            return run_stages(
                opened.model,
                opened.inputs(),
                self.schedule,
                tune=config,
                batches=batches,
                loss=None if self.teaching is None else self.teaching.loss(opened.model, config),
                progress=None if terminal.quiet else RichProgress(),
                on_stage=partial(_announce, self.schedule),
                folder=self.folder,
                identity=f"{opened.name} {self.teaching or ''}".strip(),
                data=calibration(opened, self.data, self.seed),
                use_data=self.data.use_data,
                evaluate=evaluator(opened, self.recover),
                seed=self.seed,
                observe=terminal.step,
                **self.choices,
            )
        except KeyboardInterrupt:
            msg = f"interrupted; the same command goes on where it was, from {self.folder}"
            raise KeyboardInterrupt(msg) from None

    def settings(self, result: Compressed) -> dict[str, Any]:
        """Return what the record should say besides the plan."""
        return {
            **result.record.settings,
            "calibration": self.data.calibration,
            "use_data": self.data.use_data,
            "tuning": self.config.model_dump(),
            "distillation": None if self.teaching is None else dataclasses.asdict(self.teaching),
        }


def _folded(result: Compressed, opened: Opened) -> Compressed:
    """Return the outcome with batch norm merged into the layers: at the end, since what is folded cannot be tuned."""
    from tenfold.pipeline import measurement
    from tenfold.profiling import profile
    from tenfold.surgery import fuse_batchnorm_, fused_pairs

    small = result.model.eval()
    fuse_batchnorm_(small, opened.inputs())
    plan = result.plan.replace(fused=fused_pairs(small))
    after = measurement(profile(small, opened.inputs()), score=result.record.after.score)
    return dataclasses.replace(result, model=small, plan=plan, record=result.record.replace(plan=plan, after=after))


def _announce(schedule: Schedule, stage: Stage) -> None:
    import logging

    before, after = stage.record.before, stage.record.after
    what = "training only" if stage.final else f"{len(stage.record.layers)} layers, round {stage.record.round}"
    total = f" of {schedule.rounds}" if not stage.final else ""
    message = "stage %d (%s%s): %s to %s MACs, %d epochs"
    logging.getLogger("tenfold").info(
        message, stage.index, what, total, f"{before.macs:,}", f"{after.macs:,}", stage.epochs
    )


def _schedule(staging: Staging, decide: Decide, epochs: int, seed: int) -> Schedule:
    """Return the schedule that the options stand for."""
    from tenfold.cli.deciding import plan_choices
    from tenfold.iterative import Schedule

    choices = plan_choices(decide, seed)
    return Schedule.of(
        {
            "rounds": staging.stages,
            "budget": choices["budget"],
            "path": staging.path,
            "rule": choices["rule"].to_dict(),
            "layers_per_stage": staging.layers_per_stage,
            "order": staging.order,
            "formats": choices["formats"],
            "keep": choices["keep"],
            "keep_ends": choices["keep_ends"],
            "epochs": epochs,
            "final_epochs": staging.final_epochs,
        }
    )


def _read(staging: Staging, decide: Decide, epochs: int | None) -> Schedule:
    """Return the schedule of a file, which no option may change.

    Raises:
        TuningError: there is none, or it cannot be.
    """
    from tenfold.errors import TenfoldError, TuningError
    from tenfold.iterative import Schedule

    changed = [field for field in dataclasses.fields(staging) if field.name not in ("schedule", "fit_to")]
    given = [f.name for f in changed if getattr(staging, f.name) != f.default]
    decided = [f.name for f in dataclasses.fields(decide) if f.name not in ("fold", "algorithm")]
    given += [name for name in decided if getattr(decide, name) not in (None, [])]
    given += ["tune-epochs"] if epochs is not None else []
    if given:
        msg = f"--schedule decides everything; leave --{given[0].replace('_', '-')} out, or edit the file."
        raise Misuse(msg)
    file = staging.schedule
    if file is None or not file.is_file():
        msg = f"there is no schedule at {file}"
        raise TuningError(msg)
    try:
        return Schedule.from_text(file.read_text(encoding="utf-8"), source=str(file))
    except (TenfoldError, UnicodeDecodeError) as error:
        raise TuningError(str(error)) from error
