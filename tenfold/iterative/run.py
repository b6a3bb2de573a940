"""Stage after stage: compress a little, let somebody train, store, go on. Killed anywhere, it ends the same."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from tenfold import __version__
from tenfold.allocation.schedule import Schedule
from tenfold.calibration import calibrate
from tenfold.checkpoint import digest
from tenfold.decompositions import Moments
from tenfold.errors import AgreementWarning, DataError, RecipeError, warn
from tenfold.iterative.folder import Run, RunFolder
from tenfold.iterative.next_plan import StagePlanner, Step, unchanged_plan, whole_plan
from tenfold.iterative.stage import Stage
from tenfold.pipeline import Compressed, apply_decision, measurement
from tenfold.planning import Decision, Score, analyse
from tenfold.planning.outcome import warn_if_low
from tenfold.planning.unit_kinds import kinds_of, wants_units
from tenfold.profiling import agreement, environment, profile
from tenfold.records import Agreement, Analysis, Cost, Plan, Profile, Recipe, RunRecord, StageLayer, StageRecord
from tenfold.records.metric import FRACTION
from tenfold.runtime import Runtime
from tenfold.surgery import reestimate_batchnorm_
from tenfold.tensors.finite import check_finite
from tenfold.tracing import copied, device_of, gathered
from tenfold.tracing.contexts import kept_modes
from tenfold.tracing.input_batches import GatheredBatches
from tenfold.tracing.inputs import arguments, digest_batches, tensors_in
from tenfold.tracing.samples import count_samples, parted
from tenfold.training import TuneResult

logger = logging.getLogger("tenfold")

Stages = Generator[Stage, "TuneResult | None", Compressed]


def stages(
    model: nn.Module,
    example_inputs: Any,
    recipe: Recipe | Mapping[str, Any] | str,
    schedule: Schedule | Mapping[str, Any] | None = None,
    *,
    data: Iterable[Any] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    runtime: Runtime | None = None,
) -> Stages:
    """Yield one stage after the other, each with a model that is compressed a little further and is to be trained.

    Multi-stage compression (MUSCO: Gusak et al. 2019, arXiv 1903.09973): ranks are chosen again from the trained
    factors, and these are compressed further at the cost of factors. Train ``stage.model`` in place by any loop, then
    ask for the next stage, which is what a ``for`` loop does; the generator returns what ``compress`` returns. A
    ``TuneResult`` that is sent into it goes into the record. Use it with a loop of your own, and
    ``compress_iteratively`` with the built-in one.

    With ``runtime.folder``, each stage is a checkpoint there as soon as it is complete. The same call continues where
    it was killed, in a new process too: with the stage that was not complete, from the model with which that started.
    If the training is resumable (``finetune(stage.model, ..., folder=stage.folder)``), the end is the same to the last
    bit.

    Args:
        model: any trained module; stays as it is. It may hold factorized layers.
        example_inputs: what its forward takes; costs are those of one forward on them.
        recipe: what is wanted in the end: a ``Recipe``, a mapping of its fields, or a budget such as ``"macs=0.5"``.
        schedule: in how many stages, and how far in each.
        data: unlabeled batches as the forward takes them; see ``compress``. Without, weights alone decide. A part is
            left alone, on which the agreement with the original is measured after each stage.
        evaluate: returns the score of a model: see ``compress``; called on the original, and around each training.
        runtime: how it is done; ``folder`` and ``identity`` are those of the run.

    Raises:
        RecipeError: a recipe that is not valid.
        TuningError: a schedule that is not valid, or not for this recipe.
        DataError: no calibration batches.
        BudgetError: the target is out of reach; raised before the first stage.
        PlanError: there is nothing to compress.
        CheckpointError: a folder that is not writable, or holds something else, or another run.
        FileError: another process works in the folder.
        UnknownNameError: a kind of unit that does not exist.
        WeightError: a parameter or buffer has NaN or infinity.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> for stage in stages(net, torch.zeros(1, 64), "macs=0.25", Schedule(rounds=2)):
        ...     print(stage.index, stage.record.after.macs)  # train(stage.model) comes here
        1 4096
        2 2048
    """
    recipe, schedule, runtime = Recipe.of(recipe), Schedule.of(schedule), runtime or Runtime()
    schedule.check(recipe)
    if data is not None and wants_units(recipe) and not recipe.units:
        logger.info("units (%s) stay as they are: stages plan layers one by one", ", ".join(kinds_of(recipe)))
    elif recipe.units:
        msg = f"units ({', '.join(kinds_of(recipe))}) are not narrowed: stages plan layers one by one"
        warn(msg)
    if recipe.calibration.measures:
        msg = "stages plan by gradients: leave metric: divergence out of the recipe's calibration"
        raise RecipeError(msg)
    check_finite(model)
    if runtime.latency_inputs is None:
        runtime = runtime.replace(latency_inputs=example_inputs)
    every = None if data is None else gathered(data, model, example_inputs, device_of(model, example_inputs))
    planner = StagePlanner(recipe, schedule, profile(model, example_inputs), runtime)
    folder = None
    if runtime.folder is not None:
        run = _identify(model, example_inputs, planner, every)
        folder = RunFolder(runtime.folder, run)
    # What is wrong with the arguments is raised at the call and not at the first stage.
    score = None if evaluate is None else Score.of(evaluate)
    if every is None:
        return _Run(model, example_inputs, planner, None, [], score, folder).go()
    batches, held_out = parted(model, every, recipe.calibration.held_out_of(count_samples(every)))
    return _Run(model, example_inputs, planner, GatheredBatches(batches), held_out, score, folder).go()


@dataclass(frozen=True, eq=False)
class _Now:
    """Where a run stands: the model as the last stage left it, and the record of all stages."""

    model: nn.Module
    record: RunRecord

    @property
    def done(self) -> tuple[StageRecord, ...]:
        return self.record.stages


@dataclass(frozen=True, eq=False)
class _Run:
    """All that stays the same from stage to stage."""

    original: nn.Module
    inputs: Any
    planner: StagePlanner
    batches: list[Any] | None
    held_out: list[Any]
    evaluate: Score | None
    folder: RunFolder | None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def schedule(self) -> Schedule:
        return self.planner.schedule

    @property
    def recipe(self) -> Recipe:
        return self.planner.recipe

    def watch(self, step: str) -> AbstractContextManager[None]:
        return self.planner.runtime.step(step, self.seconds)

    def go(self) -> Stages:
        """Yield the stages; return the outcome. The folder is in use until then."""
        with nullcontext() if self.folder is None else self.folder:
            return (yield from self._stages())

    def _stages(self) -> Stages:
        now = self._resume()
        while (found := self._started(now) or self._next(now)) is not None:
            stage, record = found
            with kept_modes(stage.model), self.watch("train"):
                result = yield stage
            stage.model.zero_grad(set_to_none=True)
            now = self._complete(stage, record, result)
        if self.recipe.budget and not self.planner.met(profile(now.model, self.inputs), now.done):
            logger.warning("the budget is not met after the last round: more rounds, or a stronger rule, may meet it")
        plan, agreed = now.record.plan, now.record.agreement
        if agreed is not None:
            warn_if_low(agreed, count_samples(self.batches or []), tuned=True)
        return Compressed(now.model, plan, now.record, self.original, partial(self._analyse, plan))

    def _analyse(self, plan: Plan) -> Analysis:
        """Return what the weights of the original say, for a report."""
        return analyse(self.original, profile(self.original, self.inputs), plan)

    def _resume(self) -> _Now:
        """Return where the run stands on disk; at its very beginning if there is nothing."""
        done = 0 if self.folder is None else self.folder.done
        if self.folder is not None and done:
            logger.info("going on after stage %d in %s", done, self.folder.path)
            return _Now(*self.folder.read(done, self.original))
        if self.folder is None or self.folder.started(1, self.original) is None:
            with self.watch("check the target"):
                self.planner.check_reachable(self.original)
        cost = self.planner.original
        scores = {}
        if self.evaluate is not None and (self.folder is None or self.folder.started(1, self.original) is None):
            with self.watch("evaluate"):
                scores["original"] = self.evaluate.of_original(self.original)
        plan = Plan(
            tenfold=__version__,
            model=cost.model,
            recipe=self.recipe,
            before=cost.cost,
            after=cost.cost,
            layers=(),
        )
        start = measurement(cost, score=scores.get("original"))
        record = RunRecord(
            before=start,
            after=start,
            scores=scores,
            metric=FRACTION if self.evaluate is None else self.evaluate.metric,
            plan=plan,
            settings={"schedule": self.schedule.model_dump(mode="json")},
            environment=environment(device_of(self.original, self.inputs)),
        )
        return _Now(self.original, record)

    def _started(self, now: _Now) -> tuple[Stage, RunRecord] | None:
        """Return the stage that was started before a kill."""
        index = len(now.done) + 1
        found = None if self.folder is None else self.folder.started(index, self.original)
        if found is None:
            return None
        model, plan, record = found
        return self._stage(model, plan, record), record

    def _next(self, now: _Now) -> tuple[Stage, RunRecord] | None:
        """Return the next stage, its compression done; None when the run is at its end."""
        index = len(now.done) + 1
        if now.done and now.done[-1].final:
            return None
        self.seconds.clear()
        cost = profile(now.model, self.inputs)
        moments = self._moments(now.model, cost)
        with self.watch("plan"):
            step = self.planner.next(now.model, cost, moments, now.done)
        if step is None:
            return self._last(now, cost, index)
        decision = Decision(
            self.recipe,
            step.plan,
            now.model,
            cost,
            self.inputs,
            None,
            self.batches or [],
            moments,
            seconds=self.seconds,
        )
        with self.watch("compress"):
            target = self.original if self.schedule.fit_to == "original" else None
            blocks = None if self.folder is None else self.folder.blocks(index)
            small, plan = apply_decision(decision, step.plan, self.planner.runtime, target=target, folder=blocks)
        if moments is None and self.batches:
            with self.watch("re-estimate batch norm"):
                reestimate_batchnorm_(small, self.batches)
        past = now.record.plan if now.done else None
        whole = whole_plan(past, plan, self.planner.original, index).replace(recipe=self.recipe)
        own = _record(index, step, plan, cost)
        return self._begin(now, small, plan, whole, own)

    def _moments(self, model: nn.Module, cost: Profile) -> dict[str, Moments] | None:
        wanted = self.recipe.calibration
        if not self.batches or not wanted.plans:
            return None
        with self.watch("calibrate"):
            specs = self.planner.changeable(model, cost)
            return calibrate(model, self.batches, specs, wanted, seed=self.recipe.seed)

    def _last(self, now: _Now, cost: Profile, index: int) -> tuple[Stage, RunRecord] | None:
        """Return the stage that only trains, if there is to be one."""
        if not now.done or not self.schedule.final_epochs:
            return None
        own = StageRecord(index=index, round=now.done[-1].round, final=True, before=cost.cost, after=cost.cost)
        own = own.replace(latency_share=now.done[-1].latency_share)
        return self._begin(now, copied(now.model), unchanged_plan(now.record.plan, cost), now.record.plan, own)

    def _begin(self, now: _Now, model: nn.Module, plan: Plan, whole: Plan, own: StageRecord) -> tuple[Stage, RunRecord]:
        """Return a stage that begins, as it is on disk if it is kept there."""
        scores = dict(now.record.scores)
        if self.evaluate is not None:
            scores["compressed"] = self._score(model)
            own = own.replace(scores={"compressed": scores["compressed"]})
        own = own.replace(seconds=dict(self.seconds))
        after = measurement(profile(model, self.inputs), score=scores.get("compressed"))
        scores.pop("tuned", None)
        record = now.record.replace(plan=whole, after=after, scores=scores, stages=(*now.done, own))
        if self.folder is not None:
            self.folder.begin(own.index, model, plan, record)
            model, plan, record = self.folder.started(own.index, self.original) or (model, plan, record)
        return self._stage(model, plan, record), record

    def _stage(self, model: nn.Module, plan: Plan, record: RunRecord) -> Stage:
        own, earlier = record.stages[-1], record.stages[:-1]
        return Stage(
            index=own.index,
            model=model,
            plan=plan,
            whole=record.plan,
            record=own,
            epochs=self.schedule.final_epochs if own.final else self.schedule.epochs,
            done_epochs=len(earlier) * self.schedule.epochs,
            final=own.final,
            folder=None if self.folder is None else self.folder.training(own.index),
            identity=f"{self.planner.runtime.identity} stage {own.index}".strip(),
        )

    def _complete(self, stage: Stage, record: RunRecord, result: TuneResult | None) -> _Now:
        """Return where the run stands after a stage was trained, which is then on disk if it is kept there."""
        scores = dict(record.scores)
        epochs = () if result is None else tuple(epoch.model_dump() for epoch in result.history)
        own = stage.record
        if self.evaluate is not None:
            scores["tuned"] = self._score(stage.model)
            own = own.replace(scores={**own.scores, "tuned": scores["tuned"]})
        agreed = self._agreement(stage.model)
        own = own.replace(tuning=epochs, seconds={**own.seconds, **self.seconds})
        record = record.replace(
            stages=(*record.stages[:-1], own),
            after=record.after.replace(score=scores.get("tuned")),
            scores=scores,
            agreement=agreed,
            tuning=(*record.tuning, *({"stage": stage.index, **epoch} for epoch in epochs)),
            seconds={k: v + record.seconds.get(k, 0.0) for k, v in {**record.seconds, **own.seconds}.items()},
        )
        if self.folder is None:
            return _Now(stage.model, record)
        self.folder.complete(stage.index, stage.model, record)
        return _Now(*self.folder.read(stage.index, self.original))

    def _agreement(self, model: nn.Module) -> Agreement | None:
        """Return how far a trained model agrees with the original where nothing was fitted, as ``compress`` has it."""
        if not self.batches:
            return None
        with self.watch("compare"):
            try:
                looked_at = self.held_out or self.batches
                return agreement(self.original, model, looked_at, held_out=bool(self.held_out))
            except DataError as error:
                warn(f"{error}.", AgreementWarning)
                return None

    def _score(self, model: nn.Module) -> float:
        with self.watch("evaluate"):
            return self.evaluate(model) if self.evaluate is not None else 0.0


def _record(index: int, step: Step, plan: Plan, cost: Profile) -> StageRecord:
    """Return what a stage is to reach and what it changes."""
    layers = {}
    for layer in plan.factorized:
        known = cost.layer(layer.path)
        layers[layer.path] = StageLayer(
            format=str(layer.format),
            rank=layer.rank or {},
            was_format=known.format,
            was_rank=known.rank,
            rel_error=layer.rel_error,
        )
    return StageRecord(
        index=index,
        round=step.round,
        limits=step.limits,
        before=cost.cost,
        after=Cost(params=plan.after.params, macs=plan.after.macs),
        layers=layers,
        latency_share=step.latency_share,
    )


def _identify(model: nn.Module, example_inputs: Any, planner: StagePlanner, batches: Sequence[Any] | None) -> Run:
    """Return what the run is: model, data, recipe, schedule, and whatever else the outcome depends on."""
    shapes = [tuple(t.shape) for t in tensors_in(arguments(example_inputs))]
    return Run(
        tenfold=__version__,
        model=digest(model.state_dict()),
        data="" if batches is None else digest_batches(batches),
        recipe=planner.recipe,
        schedule=planner.schedule,
        choices={"the example inputs": str(shapes), "the identity": repr(planner.runtime.identity)},
    )
