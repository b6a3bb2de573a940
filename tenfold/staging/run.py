"""Stage after stage: compress a little, let somebody train, store, go on. Killed anywhere, it ends the same."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from tenfold import __version__
from tenfold.calibration import calibrate, called_layers
from tenfold.checkpoint import digest
from tenfold.decompositions import Decomposition
from tenfold.parallel import Workers
from tenfold.pipeline import Compressed, UseData, check_use_data, measurement, replace_layers
from tenfold.planning import analyse
from tenfold.profiling import LatencyTable, environment, profile
from tenfold.profiling.step_timer import StepTimer
from tenfold.records import Analysis, Cost, Plan, Profile, RunRecord, StageLayer, StageRecord
from tenfold.registry import check_choice
from tenfold.staging.deciding import Decider, Step, unchanged_plan, whole_plan
from tenfold.staging.folder import Run, RunFolder
from tenfold.staging.schedule import Schedule
from tenfold.staging.stage import Stage
from tenfold.surgery import reestimate_batchnorm_
from tenfold.tracing import device_of, gathered
from tenfold.tracing.contexts import kept_modes
from tenfold.tracing.inputs import arguments, digest_batches, tensors_in
from tenfold.training import TuneResult

logger = logging.getLogger("tenfold")

FitTo = Literal["original", "current"]
Stages = Generator[Stage, "TuneResult | None", Compressed]


def stages(  # noqa: PLR0913 - the one call that has every choice
    model: nn.Module,
    example_inputs: Any,
    schedule: Schedule | Mapping[str, Any],
    *,
    data: Iterable[Any] | None = None,
    use_data: UseData = "sequential",
    fit_to: FitTo = "current",
    algorithms: Mapping[str, Decomposition] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    folder: str | Path | None = None,
    identity: str = "",
    latency_inputs: Any = None,
    clock: LatencyTable | None = None,
    seed: int = 0,
    workers: Workers | None = None,
    observe: Callable[[str], None] | None = None,
) -> Stages:
    """Yield one stage after the other, each with a model that is compressed a little further and is to be trained.

    Multi-stage compression (MUSCO: Gusak et al. 2019, arXiv 1903.09973): ranks are chosen anew from the trained
    factors, and these are compressed further at the cost of factors. Train ``stage.model`` in place by any loop, then
    ask for the next stage, which is what a ``for`` loop does; the generator returns what ``compress`` returns. A
    ``TuneResult`` that is sent into it goes into the record.

    With a ``folder``, each stage is a checkpoint there as soon as it is complete. The same call goes on where it was
    killed, in a new process too: with the stage that was not complete, from the model with which that began. If the
    training is resumable (``finetune(stage.model, ..., folder=stage.folder)``), the end is the same to the last bit.

    Args:
        model: any trained module; stays as it is. It may hold factorized layers.
        example_inputs: what its forward takes; costs are those of one forward on them.
        schedule: in how many stages, and how far in each.
        data: unlabeled batches as the forward takes them. Without, weights alone decide.
        use_data: see ``compress``; batch norm is estimated anew where the weights alone were fitted (``norms``).
        fit_to: whose outputs the sequential fits of later stages are to meet: those of the ``current`` model, as
            trained last, or those of the ``original`` one. Training moves what layers put out, and the layers after
            them with it: fits to the original tear that apart again.
        algorithms: by format, instead of the format's default algorithm.
        evaluate: returns the score of a model as a fraction; called on the original, and around each training.
        folder: where to keep the stages; nowhere by default.
        identity: whatever else the outcome depends on, in any words; a folder of another is refused.
        latency_inputs: what to measure latency on, for a budget of it; the example inputs if left out.
        clock: times layers for a latency budget.
        seed: of everything that draws random numbers.
        workers: who does what falls into independent layers, see ``compress``; the outcome is the same.
        observe: called with the name of each step as it begins.

    Raises:
        TuningError: a schedule that cannot be.
        DataError: the data hold no batch.
        UnknownNameError: a ``use_data`` or ``fit_to`` that does not exist.
        BudgetError: the target is out of reach; said before the first stage.
        PlanError: there is nothing to compress.
        CheckpointError: a folder that is not writable, or holds something else, or another run.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> schedule = Schedule(rounds=2, budget={"macs": 0.25})
        >>> for stage in stages(net, torch.zeros(1, 64), schedule):
        ...     print(stage.index, stage.record.after.macs)  # train(stage.model) comes here
        1 4096
        2 2048
    """
    check_use_data(use_data)
    check_choice("fit_to", fit_to, get_args(FitTo))
    schedule = Schedule.of(dict(schedule) if isinstance(schedule, Mapping) else schedule)
    batches = None if data is None else gathered(data, device_of(model, example_inputs))
    original = profile(model, example_inputs)
    inputs = example_inputs if latency_inputs is None else latency_inputs
    decider = Decider(schedule, original, inputs, algorithms, clock, seed, workers)
    kept = None
    if folder is not None:
        choices = {"use_data": use_data, "fit_to": fit_to, "seed": str(seed), "the identity": repr(identity)}
        choices["algorithms"] = str({k: v.to_dict() for k, v in (algorithms or {}).items()} or "the default")
        kept = RunFolder(folder, _identify(model, example_inputs, schedule, batches, choices))
    watch = StepTimer(observe)
    run = _Run(model, example_inputs, decider, batches, use_data, fit_to, evaluate, kept, identity, watch)
    return run.go()  # what is wrong with the arguments is said at the call and not at the first stage


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
    decider: Decider
    batches: list[Any] | None
    use_data: UseData
    fit_to: FitTo
    evaluate: Callable[[nn.Module], float] | None
    folder: RunFolder | None
    identity: str
    watch: StepTimer

    @property
    def schedule(self) -> Schedule:
        return self.decider.schedule

    def go(self) -> Stages:
        """Yield the stages; return the outcome."""
        now = self._resume()
        while (found := self._begun(now) or self._next(now)) is not None:
            stage, record = found
            with kept_modes(stage.model), self.watch("train"):
                told = yield stage
            stage.model.zero_grad(set_to_none=True)
            now = self._complete(stage, record, told)
        if self.schedule.budget and not self.decider.met(profile(now.model, self.inputs), now.done):
            logger.warning("the budget is not met after the last round: more rounds, or a stronger rule, may meet it")
        plan = now.record.plan
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
        if self.folder is None or self.folder.begun(1, self.original) is None:
            with self.watch("check the target"):
                self.decider.check_reachable(self.original)
        cost = self.decider.original
        scores = {}
        if self.evaluate is not None and (self.folder is None or self.folder.begun(1, self.original) is None):
            scores["original"] = self._score(self.original)
        plan = Plan(
            tenfold=__version__,
            model=cost.model,
            seed=self.decider.seed,
            before=cost.cost,
            after=cost.cost,
            layers=(),
        )
        start = measurement(cost, score=scores.get("original"))
        record = RunRecord(
            seed=self.decider.seed,
            before=start,
            after=start,
            scores=scores,
            plan=plan,
            settings={"schedule": self.schedule.model_dump(mode="json"), "fit_to": self.fit_to},
            environment=environment(device_of(self.original, self.inputs)),
        )
        return _Now(self.original, record)

    def _begun(self, now: _Now) -> tuple[Stage, RunRecord] | None:
        """Return the stage that was begun before a kill."""
        index = len(now.done) + 1
        found = None if self.folder is None else self.folder.begun(index, self.original)
        if found is None:
            return None
        model, plan, record = found
        return self._stage(model, plan, record), record

    def _next(self, now: _Now) -> tuple[Stage, RunRecord] | None:
        """Return the next stage, its compression done; None when the run is at its end."""
        index = len(now.done) + 1
        if now.done and now.done[-1].final:
            return None
        self.watch.seconds.clear()
        cost = profile(now.model, self.inputs)
        moments = None
        if self.batches and self.use_data != "norms":
            with self.watch("calibrate"):
                moments = calibrate(now.model, self.batches, called_layers(cost), seed=self.decider.seed)
        with self.watch("plan"):
            step = self.decider.next(now.model, cost, moments, now.done)
        if step is None:
            return self._last(now, cost, index)
        with self.watch("compress"):
            small, plan = replace_layers(
                now.model,
                step.plan,
                self.batches or [],
                moments,
                self.use_data,
                original=self.original if self.fit_to == "original" else None,
                seed=self.decider.seed,
                workers=self.decider.workers,
            )
        if moments is None and self.batches:
            with self.watch("re-estimate batch norm"):
                reestimate_batchnorm_(small, self.batches)
        past = now.record.plan if now.done else None
        whole = whole_plan(past, plan, self.decider.original, index)
        own = _record(index, step, plan, cost)
        return self._begin(now, small, plan, whole, own)

    def _last(self, now: _Now, cost: Profile, index: int) -> tuple[Stage, RunRecord] | None:
        """Return the stage that only trains, if there is to be one."""
        if not now.done or not self.schedule.final_epochs:
            return None
        own = StageRecord(index=index, round=now.done[-1].round, final=True, before=cost.cost, after=cost.cost)
        own = own.replace(latency_share=now.done[-1].latency_share)
        return self._begin(now, copy.deepcopy(now.model), unchanged_plan(now.record.plan, cost), now.record.plan, own)

    def _begin(self, now: _Now, model: nn.Module, plan: Plan, whole: Plan, own: StageRecord) -> tuple[Stage, RunRecord]:
        """Return a stage that begins, as it is on disk if it is kept there."""
        scores = dict(now.record.scores)
        if self.evaluate is not None:
            scores["compressed"] = self._score(model)
            own = own.replace(scores={"compressed": scores["compressed"]})
        own = own.replace(seconds=dict(self.watch.seconds))
        after = measurement(profile(model, self.inputs), score=scores.get("compressed"))
        scores.pop("tuned", None)
        record = now.record.replace(plan=whole, after=after, scores=scores, stages=(*now.done, own))
        if self.folder is not None:
            self.folder.begin(own.index, model, plan, record)
            model, plan, record = self.folder.begun(own.index, self.original) or (model, plan, record)
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
            identity=f"{self.identity} stage {own.index}".strip(),
        )

    def _complete(self, stage: Stage, record: RunRecord, told: TuneResult | None) -> _Now:
        """Return where the run stands after a stage was trained, which is then on disk if it is kept there."""
        scores = dict(record.scores)
        epochs = () if told is None else tuple(epoch.model_dump() for epoch in told.history)
        own = stage.record
        if self.evaluate is not None:
            scores["tuned"] = self._score(stage.model)
            own = own.replace(scores={**own.scores, "tuned": scores["tuned"]})
        own = own.replace(tuning=epochs, seconds={**own.seconds, **self.watch.seconds})
        record = record.replace(
            stages=(*record.stages[:-1], own),
            after=record.after.replace(score=scores.get("tuned")),
            scores=scores,
            tuning=(*record.tuning, *({"stage": stage.index, **epoch} for epoch in epochs)),
            seconds={k: v + record.seconds.get(k, 0.0) for k, v in {**record.seconds, **own.seconds}.items()},
        )
        if self.folder is None:
            return _Now(stage.model, record)
        self.folder.complete(stage.index, stage.model, record)
        return _Now(*self.folder.read(stage.index, self.original))

    def _score(self, model: nn.Module) -> float:
        with self.watch("evaluate"):
            return float(self.evaluate(model)) if self.evaluate is not None else 0.0


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


def _identify(
    model: nn.Module, example_inputs: Any, schedule: Schedule, batches: Sequence[Any] | None, choices: Mapping[str, str]
) -> Run:
    """Return what the run is: the model, the data, the schedule, and all other choices by name."""
    shapes = [tuple(t.shape) for t in tensors_in(arguments(example_inputs))]
    return Run(
        tenfold=__version__,
        model=digest(model.state_dict()),
        data="" if batches is None else digest_batches(batches),
        schedule=schedule,
        choices={"the example inputs": str(shapes), **choices},
    )
