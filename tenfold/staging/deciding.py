"""What the next stage is to do with a model, as a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from tenfold.decompositions import Decomposition, Moments
from tenfold.errors import BudgetError, PlanError
from tenfold.parallel import Workers
from tenfold.pipeline import decide
from tenfold.planning import plan as make_plan
from tenfold.planning import recost
from tenfold.planning.undecided import cheap_ends
from tenfold.profiling import LatencyTable
from tenfold.records import Budget, LayerPlan, Plan, Profile, StageRecord
from tenfold.staging.schedule import Schedule

_VISITED = "compressed in this round already"
_LATER = "its turn comes in a later stage"


@dataclass(frozen=True)
class Step:
    """What a stage is to do: in which round, within which limits, and what that will do to the latency."""

    round: int
    plan: Plan
    limits: dict[str, float]
    latency_share: float | None = None


@dataclass(frozen=True, eq=False)
class Decider:
    """Decides stage after stage by a schedule.

    Attributes:
        schedule: how far each round goes.
        original: profile of the model before the first stage.
        algorithms: by format, instead of the format's default algorithm.
        latency_inputs: what latencies are measured on.
        clock: times layers for a budget of latency.
        seed: of every algorithm that draws random numbers.
        workers: who computes what the rule weighs; this process if None.
    """

    schedule: Schedule
    original: Profile
    latency_inputs: Any
    algorithms: Mapping[str, Decomposition] | None = None
    clock: LatencyTable | None = None
    seed: int = 0
    workers: Workers | None = None
    _memory: dict[str, dict[Any, Any]] = field(default_factory=dict, repr=False)  # of the original weights

    def next(
        self, model: nn.Module, now: Profile, moments: Mapping[str, Moments] | None, done: Sequence[StageRecord]
    ) -> Step | None:
        """Return what the next stage is to do; None when the target is met, or nothing changes any more.

        Args:
            model: as the last stage left it.
            now: its profile.
            moments: what data say of its layers.
            done: the records of all stages so far.

        Raises:
            BudgetError: the budget cannot be met.
            PlanError: there is nothing to do from the start.
        """
        if self.met(now, done):
            if not done:
                msg = "nothing is to be done: the model is within the budget as it is"
                raise PlanError(msg)
            return None
        reasons: list[str] = []
        for number, visited in self._rounds_left(done):
            if self.schedule.aims and self._within(self.schedule.limits(number, self.original.cost), now, done):
                continue
            step = self._step(number, visited, model, now, moments, done)
            if step.plan.factorized:
                return step
            reasons = [layer.reason for layer in step.plan.layers if layer.before.params]
            if not visited and not self.schedule.aims and not isinstance(self.schedule.rule, tuple):
                break  # the same rule would say the same of the same weights again
        if not done:
            shown = "; ".join(sorted(set(reasons))[:3])
            msg = f"nothing is to be done: no layer would be factorized. Reasons: {shown}"
            raise PlanError(msg)
        return None

    def met(self, now: Profile, done: Sequence[StageRecord]) -> bool:
        """Whether the model is within the budget; never without one."""
        target = self.schedule.target(self.original.cost)
        return bool(target) and self._within(target, now, done)

    def check_reachable(self, model: nn.Module) -> None:
        """Raise BudgetError if the budget is out of reach of the rule: better now than after days of training.

        A latency is not checked, which would take measurements.
        """
        number = self.schedule.rounds
        limits = self.schedule.limits(number, self.original.cost) if self.schedule.aims else {}
        limits.pop("latency", None)
        if not limits:
            return
        try:
            self._plan(number, model, self.original, None, {}, Budget.of(_above_one(limits)), memory=self._memory)
        except BudgetError as error:
            msg = f"the target of the schedule is out of reach: {error}"
            raise BudgetError(msg) from error

    def _within(self, limits: Mapping[str, float], now: Profile, done: Sequence[StageRecord]) -> bool:
        share = latency_so_far(done)
        return all((share if k == "latency" else getattr(now.cost, k)) <= limit for k, limit in limits.items())

    def _rounds_left(self, done: Sequence[StageRecord]) -> list[tuple[int, set[str]]]:
        """Return the rounds that are not over, each with the layers that were visited in it."""
        last = done[-1].round if done else 1
        visited = {path for record in done if record.round == last for path in record.layers}
        rounds = [(number, set[str]()) for number in range(last + 1, self.schedule.rounds + 1)]
        if done and self.schedule.layers_per_stage is None:
            return rounds
        return [(last, visited), *rounds]

    def _step(
        self,
        number: int,
        visited: set[str],
        model: nn.Module,
        now: Profile,
        moments: Mapping[str, Moments] | None,
        done: Sequence[StageRecord],
    ) -> Step:
        limits = self.schedule.limits(number, self.original.cost)
        reasons = dict.fromkeys(visited, _VISITED)
        if "latency" not in limits:
            memory = None if done else self._memory
            plan = self._plan(number, model, now, moments, reasons, Budget.of(_above_one(limits)), memory=memory)
            return Step(number, self._few(plan, now), limits)
        so_far = latency_so_far(done)
        budget = Budget.of(_above_one({k: v for k, v in limits.items() if k != "latency"}))
        plan, fast = decide(
            model,
            now,
            self.latency_inputs,
            budget=budget.replace(latency=min(1.0, limits["latency"] / so_far)),
            rule=self.schedule.rule_of(number),
            moments=moments,
            clock=self.clock,
            formats=self.schedule.formats,
            keep=self.schedule.keep,
            keep_ends=self.schedule.keep_ends,
            algorithms=self.algorithms,
            workers=self.workers,
            seed=self.seed,
        )
        return Step(number, plan, limits, so_far if fast is None else so_far * fast.share)

    def _plan(
        self,
        number: int,
        model: nn.Module,
        now: Profile,
        moments: Mapping[str, Moments] | None,
        reasons: Mapping[str, str],
        budget: Budget,
        **more: Any,
    ) -> Plan:
        rule = self.schedule.rule_of(number)
        # What is a cheap end of the original is one for good, though its share of the cost grows from stage to stage.
        wanted = not rule.by_name if self.schedule.keep_ends is None else self.schedule.keep_ends
        ends = cheap_ends(self.original) if wanted else {}
        choose = partial(make_plan, rule=rule, budget=budget, formats=self.schedule.formats, keep=self.schedule.keep)
        return choose(
            model,
            now,
            reasons={**ends, **reasons},
            keep_ends=False,
            moments=moments,
            algorithms=self.algorithms,
            workers=self.workers,
            seed=self.seed,
            **more,
        )

    def _few(self, plan: Plan, now: Profile) -> Plan:
        """Return the plan for the layers of one stage only."""
        most = self.schedule.layers_per_stage
        if most is None or len(plan.factorized) <= most:
            return plan
        queue = list(plan.factorized[:: -1 if self.schedule.order == "back" else 1])
        if self.schedule.order == "cost":
            queue.sort(key=lambda layer: -layer.before.macs)
        chosen = {layer.path for layer in queue[:most]}
        layers = (
            _kept(layer) if layer.action == "factorize" and layer.path not in chosen else layer for layer in plan.layers
        )
        return recost(plan.replace(layers=tuple(layers)), now)


def _kept(layer: LayerPlan) -> LayerPlan:
    gone = dict.fromkeys(("format", "rank", "algorithm", "damage", "rel_error", "fingerprint"))
    return layer.replace(**gone, action="keep", reason=_LATER, after=layer.before)


def _above_one(limits: Mapping[str, float]) -> dict[str, float]:
    """Return absolute limits that cannot be read as shares."""
    return {name: max(limit, 1.0 + 1e-9) for name, limit in limits.items()}


def latency_so_far(done: Sequence[StageRecord]) -> float:
    """Return the predicted latency after these stages, as a share of the original's."""
    return next((r.latency_share for r in reversed(done) if r.latency_share is not None), 1.0)


def whole_plan(before: Plan | None, stage: Plan, original: Profile, index: int) -> Plan:
    """Return what became of the original model in all stages up to this one.

    Carried out on the original model, it is the same compression in one step. The errors of its layers are those of the
    stage that last changed them.

    Args:
        before: what became of it until now; None before the first stage.
        stage: what this stage does.
        original: profile of the original model.
        index: of the stage.
    """

    def merged(layer: LayerPlan) -> LayerPlan:
        known = original.layer(layer.path).cost
        if layer.action == "factorize":
            return layer.replace(before=known, reason=f"stage {index}: {layer.reason}")
        past = None if before is None else before.layer(layer.path)
        if past is not None and past.action == "factorize":
            return past
        return layer.replace(before=known)

    return stage.replace(before=original.cost, layers=tuple(merged(layer) for layer in stage.layers))


def unchanged_plan(whole: Plan, now: Profile) -> Plan:
    """Return a plan that keeps every layer as it is, for a stage that only trains."""
    layers = (
        layer.replace(
            action="keep",
            algorithm=None,
            damage=None,
            fingerprint=None,
            reason="the last stage only trains",
            before=now.layer(layer.path).cost,
            after=now.layer(layer.path).cost,
        )
        for layer in whole.layers
    )
    return whole.replace(before=now.cost, after=now.cost, layers=tuple(layers))
