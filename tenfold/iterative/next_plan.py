"""What the next stage is to do with a model, as a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from tenfold.allocation import choose, rule_of
from tenfold.allocation.schedule import Schedule, target_of
from tenfold.decompositions import Moments
from tenfold.errors import BudgetError, PlanError
from tenfold.planning import plan_within_latency, recost, tabulate
from tenfold.planning.decide import refuse_empty
from tenfold.planning.eligible import UNSEEN, changeable, cheap_ends
from tenfold.planning.target import Target
from tenfold.records import Budget, LayerPlan, LayerSpec, OptionTable, Plan, Profile, Recipe, StageRecord
from tenfold.runtime import Runtime

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
class StagePlanner:
    """Plans stage after stage by a schedule.

    Attributes:
        recipe: what is wanted in the end.
        schedule: how far each round goes.
        original: profile of the model before the first stage.
        runtime: workers, clock and what latencies are measured on.
    """

    recipe: Recipe
    schedule: Schedule
    original: Profile
    runtime: Runtime

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
        last: Plan | None = None
        for number, visited in self._rounds_left(done):
            limits = self.schedule.limits(number, self.recipe.budget, self.original.cost)
            if limits and self._within(limits, now, done):
                continue
            step = self._step(number, visited, model, now, moments, done)
            if step.plan.factorized:
                return step
            last = step.plan
            if not visited and not self.schedule.aims(self.recipe.budget) and not self.schedule.rules:
                break  # the same rule would say the same of the same weights again
        if not done and last is not None:
            refuse_empty(last, now)
        return None

    def met(self, now: Profile, done: Sequence[StageRecord]) -> bool:
        """Whether the model is within the budget; never without one."""
        target = target_of(self.recipe.budget, self.original.cost)
        return bool(target) and self._within(target, now, done)

    def check_reachable(self, model: nn.Module) -> None:
        """Raise BudgetError if the budget is out of reach of the rule: better now than after days of training.

        A latency is not checked, which would take measurements.
        """
        number = self.schedule.rounds
        limits = self.schedule.limits(number, self.recipe.budget, self.original.cost)
        limits.pop("latency", None)
        if not limits:
            return
        try:
            choose(self._table(number, model, self.original, None, {}, limits))
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
        limits = self.schedule.limits(number, self.recipe.budget, self.original.cost)
        reasons = dict.fromkeys(visited, _VISITED)
        so_far, shares, inputs = latency_so_far(done), dict(limits), self.runtime.latency_inputs
        if "latency" in limits:
            shares["latency"] = min(1.0, limits["latency"] / so_far)
        target = Target.of(self.recipe, model, inputs, self.runtime) if self.recipe.timed else None
        table = self._table(number, model, now, moments, reasons, shares, target)
        if target is None or not ("latency" in limits or self.recipe.gated):
            return Step(number, self._few(choose(table), now), limits)
        timed = plan_within_latency(model, table, inputs, target)
        if "latency" not in limits:
            return Step(number, self._few(timed.plan, now), limits)
        return Step(number, timed.plan, limits, so_far * timed.share)

    def _table(
        self,
        number: int,
        model: nn.Module,
        now: Profile,
        moments: Mapping[str, Moments] | None,
        reasons: Mapping[str, str],
        limits: Mapping[str, float],
        target: Target | None = None,
    ) -> OptionTable:
        """Return the options of a round, with the limits as its budget."""
        rule = self.schedule.rule_of(number, self.recipe)
        # What is a cheap end of the original is one for good, though its share of the cost grows from stage to stage.
        recipe = self.recipe.replace(rule=rule.to_dict(), budget=Budget.at_most(limits), keep_ends=False)
        table = tabulate(model, now, recipe, moments=moments, target=target, runtime=self.runtime)
        # Data are not collected for the ends: it is not that none reach them.
        return table.kept({**self._ends(), **reasons}, instead_of=UNSEEN)

    def _ends(self) -> dict[str, str]:
        """Return the layers that are left alone as cheap ends, with the reasons."""
        recipe = self.recipe
        wanted = not rule_of(recipe.rule).by_name if recipe.keep_ends is None else recipe.keep_ends
        return cheap_ends(self.original) if wanted else {}

    def changeable(self, model: nn.Module, now: Profile) -> dict[str, LayerSpec]:
        """Return the geometry, by path, of the layers that a stage may change: those that data have to judge."""
        specs = changeable(model, now, self.recipe.replace(keep_ends=False))
        return {path: spec for path, spec in specs.items() if path not in self._ends()}

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
    gone = dict.fromkeys(("format", "rank", "algorithm", "distortion", "rel_error", "fingerprint"))
    return layer.replace(**gone, action="keep", reason=_LATER, after=layer.before)


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
            distortion=None,
            fingerprint=None,
            reason="the last stage only trains",
            before=now.layer(layer.path).cost,
            after=now.layer(layer.path).cost,
        )
        for layer in whole.layers
    )
    return whole.replace(before=now.cost, after=now.cost, layers=tuple(layers))
