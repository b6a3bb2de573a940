"""The ways from a trained network to a small one that a row can name: one shot, stages, ADMM."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

import tenfold
from tenfold.iterative import Schedule, Training, compress_iteratively, musco
from tenfold.planning import plan as make_plan
from tenfold.profiling import profile
from tenfold.records import Plan, Recipe
from tenfold.runtime import Runtime
from tenfold.tasks.base import Task
from tenfold.training import (
    Batches,
    EpochRecord,
    LowRankConfig,
    TrainingFolder,
    TuneConfig,
    TuneProgress,
    finetune,
    train_admm,
)

Loss = Callable[[nn.Module, Any, Any], Any]


@dataclass(frozen=True, eq=False)
class Work:
    """What a row starts from: a trained network, its task, the training, and where to keep what is unfinished."""

    task: Task
    model: nn.Module
    config: dict[str, Any]
    seed: int
    folder: Path
    name: str
    train: TuneConfig
    batches: Batches
    loss: Loss | None
    report: Callable[[EpochRecord], None]

    @property
    def calibration(self) -> list[Any]:
        """The unlabeled training images that ranks and factors may know."""
        return list(self.task.calibration_batches(self.config["samples"], batch_size=125, seed=self.seed))

    @property
    def recipe(self) -> Recipe:
        """What is wanted of the row."""
        return Recipe.of(self.config["recipe"] | {"seed": self.seed})


@dataclass(frozen=True, eq=False)
class Outcome:
    """A network after its way: what was done to it, its epochs, and its scores on the way."""

    model: nn.Module
    plan: Plan | None
    epochs: tuple[EpochRecord, ...]
    scores: dict[str, float] = field(default_factory=dict)


def one_shot(work: Work, started: tuple[nn.Module, Plan | None] | None = None) -> Outcome:
    """Return the network compressed at once and then trained; ``started`` is one that is compressed already."""
    model, plan = started or compressed(work)
    before = {"compressed": work.task.evaluate(model)}
    tuned = finetune(
        model,
        work.batches,
        work.train,
        loss=work.loss,
        folder=TrainingFolder(work.folder / "tuning", work.name),
        progress=TuneProgress(work.report),
    )
    return Outcome(model, plan, tuned.history, before)


def staged(work: Work) -> Outcome:
    """Return the network after stages; ``musco`` has the published rank rule, and ends when the budget is met."""
    way = {k: v for k, v in work.config["method"].items() if k != "name"}
    recipe = work.recipe
    if work.config["method"]["name"] == "musco":
        final = way.pop("final_epochs", 0)  # its stages end when the budget is met: the rest of the training comes then
        published, schedule = musco(**way)
        recipe, schedule = recipe.replace(rule=published.rule), schedule.replace(final_epochs=final)
    else:
        schedule = Schedule.of(way)
    outcome = compress_iteratively(
        work.model,
        work.task.example_inputs(),
        recipe,
        schedule,
        tune=Training(work.batches, work.train, loss=work.loss),
        data=work.calibration,
        evaluate=work.task.evaluate,
        runtime=Runtime(folder=work.folder / "stages", identity=work.name),
    )
    epochs = [epoch for stage in outcome.record.stages for epoch in stage.tuning]
    history = tuple(EpochRecord(**epoch | {"epoch": number}) for number, epoch in enumerate(epochs, 1))
    return Outcome(outcome.model, outcome.plan, history, dict(outcome.record.stages[-1].scores))


def admm(work: Work) -> Outcome:
    """Return the network trained towards the ranks of a plan, replaced by its factors, and trained on."""
    inputs = work.task.example_inputs()
    plan = make_plan(work.model, profile(work.model, inputs), work.recipe)
    towards = int(work.config["method"]["towards"])
    first = work.train.replace(epochs=towards)
    after = work.train.replace(epochs=work.train.epochs - towards, seed=work.train.seed + 1)
    found = train_admm(
        work.model,
        plan,
        work.batches,
        LowRankConfig(train=first, tune=after),
        loss=work.loss,
        evaluate=work.task.evaluate,
        folder=TrainingFolder(work.folder, work.name),
        progress=TuneProgress(work.report),
    )
    tuned = found.tuning.history if found.tuning is not None else ()
    before = {"towards": found.training.scores[-1], "compressed": found.training.history[-1].score or 0.0}
    return Outcome(found.model, found.plan, (*found.training.history, *tuned), before)


WAYS: dict[str, Callable[[Work], Outcome]] = {"one-shot": one_shot, "stages": staged, "musco": staged, "admm": admm}


def compressed(work: Work) -> tuple[nn.Module, Plan]:
    """Return the network compressed as the row says; kept in its folder for the next time."""
    folder = work.folder / "compressed"
    if not folder.is_dir():
        tenfold.compress(
            copy.deepcopy(work.model),
            work.task.example_inputs(),
            work.recipe,
            data=work.calibration,
            runtime=Runtime(measure=False),
        ).save(folder)
    model, plan = tenfold.load(copy.deepcopy(work.model), folder)
    return model, plan
