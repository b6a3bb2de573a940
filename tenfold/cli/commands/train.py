"""tenfold train: train a dense model to low rank before it is compressed."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import NonNegativeInt, PositiveFloat

from tenfold.cli.record_options import Fields
from tenfold.cli.recovery import Distill, TuneOptions
from tenfold.cli.source import Folder, Machine, Source
from tenfold.cli.terminal import Misuse, Options, Terminal
from tenfold.records import Recipe, TuneConfig

if TYPE_CHECKING:
    from tenfold.cli.source import Opened
    from tenfold.records import Plan, RunRecord
    from tenfold.training import LearnedRanks, LowRankConfig, LowRankResult

ORDER = 37


class LowRank(Options):
    """Training to low rank.

    Attributes:
        method: admm, to the ranks of the plan; lc, ranks are learned too; plain, not to low rank: the network of the
            task as it is, from its initial weights.
        plan: train to the ranks of this plan, edited or not, instead of making one.
        rho: strength of the penalty at the start; it rises a hundredfold.
        cost_weight: for lc, instead of a budget: what all MACs of the model are worth, in units of the loss.
        final_epochs: epochs of the factorized model after it.
        out: where to write the compressed model.
    """

    method: Literal["admm", "lc", "plain"] = "admm"
    plan: Path | None = None
    rho: PositiveFloat = 0.1
    cost_weight: PositiveFloat | None = None
    final_epochs: NonNegativeInt = 0
    out: Folder = None

    def config(self, opened: Opened, tune: TuneConfig, seed: int) -> LowRankConfig:
        """Return how to train: the dense model as ``tune`` says, the factorized one as the task recommends."""
        from tenfold.cli.recovery import tune_config
        from tenfold.training import AdmmConfig, LowRankConfig

        train, final = tune_config(opened, tune, seed), None
        if self.final_epochs:
            own = tune.model_dump(include={"batch_size"}, exclude_unset=True)
            final = tune_config(opened, TuneConfig.model_validate({"epochs": self.final_epochs, **own}), seed)
        admm = AdmmConfig(rho=self.rho, last_rho=100 * self.rho, updates=max(train.epochs, 1))
        return LowRankConfig(train=train, admm=admm, tune=final)


def run(
    source: Source,
    recipe: Annotated[Recipe, Fields("Recipe", without=("calibration", "fuse_batchnorm"), file=True)],
    low_rank: LowRank,
    tune: TuneOptions,
    distill: Distill,
    machine: Machine,
    terminal: Terminal,
) -> None:
    """Train a dense model towards low rank, then compress it.

    tenfold train --task digits --budget macs=0.1 --epochs 10 --final-epochs 3 --out small

    The weights are drawn to the ranks of a plan (ADMM), or to ranks that are learned on the way (LC), until hardly
    anything is lost when factors take their place. A run that was killed goes on after its last complete epoch when
    the same command is given again. With --method plain the network of the task is trained as it is, such as those that
    are tensors from the start, and its weights are written for --weights.

    With --json, one object like that of `tenfold compress`; `scores` has `original`, `trained` (the dense model at the
    end) and `tuned` or `compressed`; `settings.towards` has by epoch how far weights were from low rank, and the score
    on the validation part with and without low rank.
    """
    from tenfold.checkpoint import save
    from tenfold.cli.recovery import claim, forget_epochs
    from tenfold.cli.show import show_outcome
    from tenfold.cli.source import open_source

    out = low_rank.out
    if out is None:
        msg = "say where to write the compressed model: --out FOLDER."
        raise Misuse(msg)
    claim(out, terminal)
    if low_rank.method == "plain":
        _plain(source, recipe, low_rank, tune, distill, machine, terminal)
        return
    opened = open_source(source, machine, recipe.seed)
    wanted = _wanted(recipe, low_rank)
    config, start = low_rank.config(opened, tune, recipe.seed), time.perf_counter()
    terminal.step("evaluate")
    original = opened.score.of_original(opened.model)
    terminal.step("train towards low rank")
    projection = _projection(opened, wanted, low_rank, terminal)
    result = _train(opened, projection, low_rank, config, distill, terminal)
    seconds = time.perf_counter() - start
    terminal.step("evaluate")
    record = _record(opened, result, original, seconds).replace(command=terminal.command, seed=recipe.seed)
    record = record.replace(settings={"method": low_rank.method, "towards": result.training.summary()})
    save(result.model, result.plan, out, record=record)
    forget_epochs(out)
    show_outcome(record, out, terminal)


def _plain(
    source: Source,
    recipe: Recipe,
    low_rank: LowRank,
    tune: TuneConfig,
    distill: Distill,
    machine: Machine,
    terminal: Terminal,
) -> None:
    from tenfold.cli.plain_training import train_plain

    given = sorted((low_rank.model_fields_set - {"method", "out"}) | (distill.model_fields_set))
    if given:
        msg = f"--method plain trains on labels, without a plan or a teacher; leave --{given[0].replace('_', '-')} out."
        raise Misuse(msg)
    train_plain(source, recipe, tune, low_rank.out or Path(), machine, terminal)


def _wanted(recipe: Recipe, low_rank: LowRank) -> Plan | Recipe:
    """Return what is to be reached; raises a usage error for choices that the method does not leave open."""
    from tenfold.cli.choices import check_recipe, plan_or_recipe, refuse_choices

    if low_rank.method == "lc":
        message = "--method lc chooses ranks by itself; leave {} out."
        refuse_choices(recipe, set(Recipe.model_fields) - {"rule", "algorithms"}, message)
        if low_rank.plan is not None:
            raise Misuse(message.format("--plan"))
        check_recipe(recipe)
        return recipe
    if low_rank.cost_weight is not None:
        msg = "--cost-weight is the price that --method lc pays for ranks; admm takes those of the plan."
        raise Misuse(msg)
    return plan_or_recipe(recipe, low_rank.plan)


def _train(
    opened: Opened,
    projection: Plan | LearnedRanks,
    low_rank: LowRank,
    config: LowRankConfig,
    distill: Distill,
    terminal: Terminal,
) -> LowRankResult:
    from tenfold.cli.recovery import identity_of, tuning_folder
    from tenfold.training import LearnedRanks, TrainingFolder, TuneEvents, train_admm

    task, teaching, out = opened.task, distill.teaching(), low_rank.out or Path()
    target = projection.identity if isinstance(projection, LearnedRanks) else projection
    identity = identity_of(opened, low_rank.replace(out=None), teaching, config.to_json(), target)
    return train_admm(
        opened.model,
        projection,
        partial(task.train_batches, batch_size=config.train.batch_size, seed=config.train.seed),
        config,
        loss=task.loss() if teaching is None else teaching.loss(opened.model, config.train),
        evaluate=partial(task.evaluate, split="validation"),
        folder=TrainingFolder(tuning_folder(out, identity), identity),
        progress=TuneEvents(terminal.on_event, "train towards low rank"),
    )


def _projection(opened: Opened, wanted: Plan | Recipe, low_rank: LowRank, terminal: Terminal) -> Plan | LearnedRanks:
    """Return the plan to reach, or what learns ranks."""
    from tenfold.planning import decide
    from tenfold.profiling import profile
    from tenfold.records import Plan
    from tenfold.runtime import Runtime
    from tenfold.training import LcConfig, LearnedRanks

    if low_rank.method == "admm" or isinstance(wanted, Plan):
        return decide(opened.model, opened.inputs(), wanted, runtime=Runtime(on_event=terminal.on_event)).plan
    own = wanted.model_dump(include={"formats"}, exclude_unset=True)
    config = LcConfig(
        budget=wanted.budget,
        cost_weight=low_rank.cost_weight,
        keep=wanted.keep,
        keep_ends=wanted.keep_ends is not False,
        seed=wanted.seed,
        **own,
    )
    return LearnedRanks(opened.model, profile(opened.model, opened.inputs()), config)


def _record(opened: Opened, result: LowRankResult, original: float, seconds: float) -> RunRecord:
    from tenfold.pipeline import measurement
    from tenfold.profiling import environment, profile
    from tenfold.records import RunRecord

    last = "compressed" if result.tuning is None else "tuned"
    scores = {"original": original, "trained": opened.score(result.training.model), last: opened.score(result.model)}
    return RunRecord(
        task=opened.name,
        before=measurement(profile(opened.model, opened.inputs()), score=original),
        after=measurement(profile(result.model, opened.inputs()), score=scores[last]),
        scores=scores,
        metric=opened.task.metric,
        plan=result.plan,
        tuning=() if result.tuning is None else tuple(epoch.model_dump() for epoch in result.tuning.history),
        seconds={"train": seconds},
        environment=environment(opened.device),
    )
