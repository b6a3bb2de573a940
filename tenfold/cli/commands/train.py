"""tenfold train: draw a dense model to low rank before it is compressed."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tenfold.cli.options import Decide, Machine, Source, Training
from tenfold.cli.terminal import Misuse, Terminal

if TYPE_CHECKING:
    from tenfold.cli.sources import Opened
    from tenfold.records import Plan, Profile, RunRecord
    from tenfold.training import LearnedRanks, LowRankResult

ORDER = 37
_HOW = "Recovery"


@dataclasses.dataclass(frozen=True)
class Towards:
    """How to train towards low rank."""

    method: Annotated[
        Literal["admm", "lc"],
        typer.Option(help="admm: to the ranks of the plan. lc: ranks are learned too.", rich_help_panel=_HOW),
    ] = "admm"
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Epochs of the dense model, on its way to low rank; by default what the task recommends for tuning.",
            rich_help_panel=_HOW,
            show_default=False,
        ),
    ] = None
    tune_epochs: Annotated[
        int, typer.Option(min=0, metavar="N", help="Epochs of the factorized model after it.", rich_help_panel=_HOW)
    ] = 0
    rho: Annotated[float, typer.Option(help="Pull at the start; it rises a hundredfold.", rich_help_panel=_HOW)] = 0.1
    cost_weight: Annotated[
        float | None,
        typer.Option(
            metavar="PRICE",
            help="For lc, instead of a budget: what all MACs of the model are worth, in units of the loss.",
            rich_help_panel=_HOW,
        ),
    ] = None


Out = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", metavar="FOLDER", help="Where to write the compressed model.", rich_help_panel="Output"
    ),
]


def run(
    ctx: typer.Context,
    source: Source,
    decide: Decide,
    towards: Towards,
    training: Training,
    machine: Machine,
    terminal: Terminal,
    out: Out = None,
) -> None:
    """Train a dense model towards low rank, then compress it.

    tenfold train --task digits --budget macs=0.1 --epochs 10 --tune-epochs 3 --out small

    The weights are drawn to the ranks of a plan (ADMM), or to ranks that are learned on the way (LC), until hardly
    anything is lost when factors take their place. A run that was killed goes on after its last complete epoch when
    the same command is given again.

    With --json, one object like that of `tenfold compress`; `scores` has `original`, `trained` (the dense model at the
    end) and `tuned` or `compressed`; `settings.towards` has by epoch how far weights were from low rank, and the score
    on the validation part with and without low rank.
    """
    if decide.fold:
        msg = "batch norm is folded in the end, by `tenfold compress --fold`; leave --fold out."
        raise Misuse(msg)
    if out is None:
        msg = "say where to write the compressed model: --out FOLDER."
        raise Misuse(msg)
    with terminal.session():
        from tenfold.checkpoint import check_target, save
        from tenfold.cli.commands.compress import show_outcome
        from tenfold.cli.sources import open_source

        check_target(out)
        terminal.step("open the model")
        opened = open_source(source, machine)
        job = _Job(opened, decide, towards, training, machine.seed, out, terminal)
        result, record = job.run()
        save(result.model, result.plan, out, record=record.replace(command=ctx.obj))
        job.clean()
        show_outcome(record, out, terminal)


@dataclasses.dataclass(frozen=True, eq=False)
class _Job:
    """What is to be done, all options read."""

    opened: Opened
    decide: Decide
    towards: Towards
    training: Training
    seed: int
    out: Path
    terminal: Terminal

    def run(self) -> tuple[LowRankResult, RunRecord]:
        """Return what came of it, not yet saved, and its record."""
        start = time.perf_counter()
        self.terminal.step("evaluate")
        original = self.opened.task.evaluate(self.opened.model)
        self.terminal.step("train towards low rank")
        result = self._train()
        seconds = time.perf_counter() - start
        self.terminal.step("evaluate")
        return result, self._record(result, original, seconds)

    def clean(self) -> None:
        """Remove the kept epochs, when the outcome is saved."""
        shutil.rmtree(self._root, ignore_errors=True)

    @property
    def _root(self) -> Path:
        return self.out.parent / f".{self.out.name}.tuning"

    def _train(self) -> LowRankResult:
        from tenfold.cli.recovering import Teaching, identity_of, tune_config
        from tenfold.profiling import profile
        from tenfold.training import AdmmConfig, LearnedRanks, LowRankConfig, RichProgress, TrainingFolder, train_admm

        opened, towards = self.opened, self.towards
        train = tune_config(opened, self.training, towards.epochs, self.seed)
        sized = Training(batch_size=self.training.batch_size)
        teaching = None if self.training.distill is None else Teaching(self.training.distill, self.training.temperature)
        config = LowRankConfig(
            train=train,
            admm=AdmmConfig(rho=towards.rho, last_rho=100 * towards.rho, updates=max(train.epochs, 1)),
            tune=tune_config(opened, sized, towards.tune_epochs, self.seed) if towards.tune_epochs else None,
        )
        projection = self._projection(profile(opened.model, opened.inputs()))
        reached = projection.identity if isinstance(projection, LearnedRanks) else projection
        identity = identity_of(opened, towards, teaching, config.to_json(), reached)
        return train_admm(
            opened.model,
            projection,
            partial(opened.task.train_batches, batch_size=train.batch_size, seed=train.seed),
            config,
            loss=None if teaching is None else teaching.loss(opened.model, train),
            evaluate=partial(opened.task.evaluate, split="validation"),
            folder=TrainingFolder(self._root / hashlib.blake2b(identity.encode()).hexdigest()[:12], identity),
            progress=None if self.terminal.quiet else RichProgress(),
        )

    def _projection(self, cost: Profile) -> Plan | LearnedRanks:
        """Return the plan to reach, or what learns ranks."""
        from tenfold.cli.deciding import names_in, plan_choices, plan_of
        from tenfold.records import Budget
        from tenfold.training import LcConfig, LearnedRanks

        decide, price = self.decide, self.towards.cost_weight
        if self.towards.method == "admm":
            if price is not None:
                msg = "--cost-weight is the price that --method lc pays for ranks; admm takes those of the plan."
                raise Misuse(msg)
            choices = {} if decide.plan is not None else plan_choices(decide, self.seed)
            return plan_of(decide, self.opened, cost, choices)
        given = {"--plan": decide.plan, "--rule": decide.rule, "--set": decide.settings, "--rank": decide.rank}
        given |= {"--algorithm": decide.algorithm}
        odd = [name for name, value in given.items() if value]
        if odd:
            msg = f"--method lc chooses ranks by itself; leave {', '.join(odd)} out."
            raise Misuse(msg)
        config = LcConfig(
            budget=Budget.parse(decide.budget) if decide.budget else Budget(),
            cost_weight=price,
            formats=tuple(names_in(decide.format)) or ("low_rank",),
            keep=tuple(decide.keep or ()),
            keep_ends=decide.keep_ends is not False,
            seed=self.seed,
        )
        return LearnedRanks(self.opened.model, cost, config)

    def _record(self, result: LowRankResult, original: float, seconds: float) -> RunRecord:
        from tenfold.pipeline import measurement
        from tenfold.profiling import environment, profile
        from tenfold.records import RunRecord

        opened, task = self.opened, self.opened.task
        last = "compressed" if result.tuning is None else "tuned"
        scores = {
            "original": original,
            "trained": task.evaluate(result.training.model),
            last: task.evaluate(result.model),
        }
        return RunRecord(
            task=opened.name,
            seed=self.seed,
            before=measurement(profile(opened.model, opened.inputs()), score=original),
            after=measurement(profile(result.model, opened.inputs()), score=scores[last]),
            scores=scores,
            plan=result.plan,
            tuning=() if result.tuning is None else tuple(epoch.model_dump() for epoch in result.tuning.history),
            seconds={"train": seconds},
            settings={"method": self.towards.method, "towards": result.training.summary()},
            environment=environment(opened.device),
        )
