"""The ways from a trained network to a small one that a row can name: one shot, stages, ADMM."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import tenfold
from tenfold.decompositions import Decomposition
from tenfold.layers import FactorizedLayer, build
from tenfold.planning import plan as make_plan
from tenfold.profiling import profile
from tenfold.ranks import rule_from
from tenfold.records import Budget, Plan
from tenfold.staging import Schedule, run_stages
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
        return list(self.task.calibration_batches(self.config["calibration"], batch_size=125, seed=self.seed))

    @property
    def algorithms(self) -> dict[str, Decomposition]:
        """Those that the row names instead of the formats' own."""
        own = self.config["algorithms"]
        return {name: Decomposition.from_dict(given | {"seed": self.seed}) for name, given in own.items()}

    @property
    def rule(self) -> dict[str, Any]:
        """The rank rule, as name and settings."""
        rule = self.config["rule"]
        return {"name": rule} if isinstance(rule, str) else dict(rule)


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
    with multiplied_out(model) if work.config.get("multiplied_out") else nullcontext():
        told = finetune(
            model,
            work.batches,
            work.train,
            loss=work.loss,
            folder=TrainingFolder(work.folder / "tuning", work.name),
            progress=TuneProgress(work.report),
        )
    return Outcome(model, plan, told.history, before)


@contextmanager
def multiplied_out(model: nn.Module) -> Iterator[None]:
    """Compute each factorized layer by its dense weight meanwhile: the same function and the same gradients.

    For formats that take longer than dense layers, here the classical trains.
    """
    layers = [module for module in model.modules() if isinstance(module, FactorizedLayer)]
    for layer in layers:
        layer.forward = partial(_by_dense_weight, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _by_dense_weight(layer: FactorizedLayer, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        weight = layer.factorization().to_dense()
    frame = build(layer.spec, nn.Parameter(torch.empty_like(weight, device="meta")), layer.bias)
    given = {"weight": weight} if layer.bias is None else {"weight": weight, "bias": layer.bias}
    found: Tensor = functional_call(frame, given, (x,))
    return found


def staged(work: Work) -> Outcome:
    """Return the network after stages; ``musco`` has the published rank rule, and ends when the budget is met."""
    way = {k: v for k, v in work.config["method"].items() if k != "name"}
    common = {"budget": work.config["budget"], "formats": work.config["formats"], "keep": tuple(work.config["keep"])}
    if work.config["method"]["name"] == "musco":
        final = way.pop("final_epochs", 0)  # its stages end when the budget is met: the rest of the training comes then
        schedule = Schedule.musco(**way).replace(budget=Budget.of(common.pop("budget")), final_epochs=final, **common)
    else:
        schedule = Schedule.of({**common, "rule": work.rule, **way})
    told = run_stages(
        work.model,
        work.task.example_inputs(),
        schedule,
        tune=work.train,
        batches=work.batches,
        loss=work.loss,
        folder=work.folder / "stages",
        identity=work.name,
        data=work.calibration,
        use_data=work.config["use_data"],
        algorithms=work.algorithms,
        evaluate=work.task.evaluate,
        seed=work.seed,
    )
    epochs = [epoch for stage in told.record.stages for epoch in stage.tuning]
    history = tuple(EpochRecord(**epoch | {"epoch": number}) for number, epoch in enumerate(epochs, 1))
    return Outcome(told.model, told.plan, history, dict(told.record.stages[-1].scores))


def admm(work: Work) -> Outcome:
    """Return the network trained towards the ranks of a plan, replaced by its factors, and trained on."""
    inputs = work.task.example_inputs()
    rule = work.rule
    plan = make_plan(
        work.model,
        profile(work.model, inputs),
        rule=rule_from(rule.pop("name"), **rule),
        budget=work.config["budget"],
        formats=work.config["formats"],
        keep=work.config["keep"],
        seed=work.seed,
    )
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
    own, folder = work.config, work.folder / "compressed"
    if not folder.is_dir():
        rule = work.rule
        tenfold.compress(
            copy.deepcopy(work.model),
            work.task.example_inputs(),
            budget=own["budget"],
            rule=rule_from(rule.pop("name"), **rule),
            formats=own["formats"],
            algorithms=work.algorithms,
            keep=own["keep"],
            data=work.calibration,
            use_data=own["use_data"],
            latency=False,
            seed=work.seed,
        ).save(folder)
    model, plan = tenfold.load(copy.deepcopy(work.model), folder)
    return model, plan
