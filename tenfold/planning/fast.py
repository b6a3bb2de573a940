"""Plans that are proven on the clock: the budget met as measured, no layer slower than before."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tenfold.errors import BudgetError
from tenfold.layers import FactorizedLayer, stage_specs
from tenfold.planning.gate import Compare, Gated, LayerBench, LayerTiming, fill_neutral_, plan_never_slower
from tenfold.planning.plan import plan as make_plan
from tenfold.planning.timing import Timing
from tenfold.profiling import Clock, compare_latency, to_memory_format
from tenfold.profiling.memory_format import candidates_for
from tenfold.records import Budget, Latency, LayerPlan, Plan, Profile, Speedup
from tenfold.surgery import restructure_

_LOG = logging.getLogger("tenfold")
_SLACK = 0.06  # a plan may stay this far below the allowance before it is made anew with more
_RELAX = 1.1


@dataclass(frozen=True)
class FastPlan:
    """A plan and the measurements that stand behind it.

    Attributes:
        plan: what to do; its layers have their measured times.
        before: the model as it is, in its best memory format.
        after: the smaller model, in its best memory format.
        speedup: how many times faster, measured in turns.
        layers: timing of every factorized layer.
        returned: timing of the layers that stay dense because they were not faster.
        met: whether the latency budget is met; True when there is none.
        rounds: how many plans were made and measured as a whole.
    """

    plan: Plan
    before: Latency
    after: Latency
    speedup: Speedup
    layers: dict[str, LayerTiming]
    returned: dict[str, LayerTiming]
    met: bool
    rounds: int


def plan_fast(
    model: nn.Module,
    profile: Profile,
    inputs: Any,
    *,
    clock: Clock,
    budget: Budget | Mapping[str, float] | None = None,
    strict: bool = True,
    rounds: int = 5,
    seconds: float = 4.0,
    layer_seconds: float = 0.4,
    compare: Compare = compare_latency,
    **planning: Any,
) -> FastPlan:
    """Return a plan whose layers all measure faster than dense ones and whose model meets its latency as measured.

    Plans by the clock, times every factorized layer against its original, then the model as a whole; where the whole
    differs from what the clock predicted, the limit is moved by as much and the plan made anew. The whole is timed on
    the structure alone, with made-up factors: nothing is decomposed yet.

    Args:
        model: the model that was profiled, on its device.
        profile: what ``profile`` said of it on these inputs.
        inputs: example inputs.
        clock: times layers, in the memory format in which the smaller model is to run.
        budget: of the whole model; ``latency`` is a share of the model's time in its best memory format.
        strict: raise if the latency cannot be met; otherwise come as near as the layers allow.
        rounds: how many plans to measure as a whole, at most.
        seconds: about how long to time the models in a round.
        layer_seconds: about how long to time a layer.
        compare: ``compare_latency``, or something in its place.
        planning: all else that ``plan`` takes, ``rule`` first of all.

    Raises:
        BudgetError: the budget cannot be met.
    """
    budget = Budget.of(dict(budget) if isinstance(budget, Mapping) else budget)
    bench = LayerBench(
        profile, clock.device, clock.dtype, clock.memory_format, clock.threads, layer_seconds, compare=compare
    )
    search = _Search(model, profile, inputs, clock, budget, seconds, compare, bench, planning)
    if budget.latency is None:
        return search.attempt(None, 1)
    timing = Timing.of(model, inputs, clock, seconds=seconds)
    wanted = budget.allowance(profile.cost, timing.dense_ms)["latency"] / timing.dense_ms
    best: FastPlan | None = None
    for number in range(1, rounds + 1):
        try:
            found = search.attempt(timing, number)
        except BudgetError:
            if best is not None and (best.met or not strict):
                return best
            if strict or number == rounds:
                raise
            timing = timing.tightened(_RELAX)
            continue
        share = 1 / found.speedup.ratio
        _LOG.info("plan %d runs in %.3f of the time, allowed are %.3f", number, share, wanted)
        best = _better(best, found, wanted)
        if (1 - _SLACK) * wanted <= share <= wanted:
            break
        timing = timing.tightened(0.985 * wanted / share)
    return _settled(best, wanted, strict=strict)


@dataclass(frozen=True, eq=False)
class _Search:
    """What stays the same from round to round."""

    model: nn.Module
    profile: Profile
    inputs: Any
    clock: Clock
    budget: Budget
    seconds: float
    compare: Compare
    bench: LayerBench
    planning: dict[str, Any]
    memory: dict[str, dict[Any, Any]] = field(default_factory=dict)

    def attempt(self, timing: Timing | None, number: int) -> FastPlan:
        """Return a plan without slower layers, and its model measured as a whole."""
        gated = plan_never_slower(lambda reasons: self._plan(timing, reasons), self.bench, learn=self._learner())
        variants, before, after = self._variants(gated)
        result = self.compare(variants, seconds=self.seconds, threads=self.clock.threads)
        first = min(before, key=lambda name: result.latencies[name].median_ms)
        last = min(after, key=lambda name: result.latencies[name].median_ms)
        pair = {"before": variants[first], "after": variants[last]}
        final = self.compare(pair, seconds=self.seconds, threads=self.clock.threads)
        return FastPlan(
            plan=gated.plan,
            before=final.latencies["before"],
            after=final.latencies["after"],
            speedup=final.speedups["after"],
            layers=gated.timings,
            returned=gated.returned,
            met=self._met(final.speedups["after"], timing),
            rounds=number,
        )

    def _plan(self, timing: Timing | None, reasons: Mapping[str, str]) -> Plan:
        return make_plan(
            self.model,
            self.profile,
            budget=self.budget,
            timing=timing,
            reasons=reasons,
            memory=self.memory,
            **self.planning,
        )

    def _learner(self) -> Callable[[LayerPlan, LayerTiming], None] | None:
        if self.budget.latency is None:
            return None  # the plan does not look at the clock: it would choose the same again

        def learn(layer: LayerPlan, measured: LayerTiming) -> None:
            known = self.profile.layer(layer.path)
            if known.spec is not None and len(known.calls) == 1:
                in_shape = known.calls[0].in_shape
                self.clock.learn(str(layer.format), known.spec, in_shape, layer.rank or {}, 1 / measured.ratio)

        return learn

    def _variants(self, gated: Gated) -> tuple[dict[str, tuple[nn.Module, Any]], list[str], list[str]]:
        small = with_structure(self.model, gated.plan)
        variants: dict[str, tuple[nn.Module, Any]] = {}
        for name in candidates_for(self.inputs):
            variants[f"before {name}"] = to_memory_format(self.model, self.inputs, name)
            variants[f"after {name}"] = to_memory_format(small, self.inputs, name)
        return variants, [n for n in variants if n.startswith("before")], [n for n in variants if n.startswith("after")]

    def _met(self, speedup: Speedup, timing: Timing | None) -> bool:
        if timing is None:
            return True
        allowed = self.budget.allowance(self.profile.cost, timing.dense_ms)["latency"]
        return timing.dense_ms / speedup.ratio <= allowed


def with_structure(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of the model that has the layers of the plan with made-up factors: to time, not to use."""
    small = restructure_(copy.deepcopy(model), plan)
    for module in small.modules():
        if isinstance(module, FactorizedLayer):
            _fill(module)
    return small


def _fill(layer: FactorizedLayer) -> None:
    for stage, spec in zip(layer.stages, stage_specs(layer), strict=True):
        for name, parameter in stage.named_parameters():
            if name == "weight":
                fill_neutral_(parameter, spec)
            else:
                parameter.data.zero_()


def _better(best: FastPlan | None, found: FastPlan, wanted: float) -> FastPlan:
    """Return the plan that meets the budget with the least to spare; failing that, the faster one."""
    if best is None:
        return found

    def rank(plan: FastPlan) -> tuple[bool, float]:
        share = 1 / plan.speedup.ratio
        return (share <= wanted, share if share <= wanted else -share)

    return max(best, found, key=rank)


def _settled(best: FastPlan | None, wanted: float, *, strict: bool) -> FastPlan:
    if best is None:
        msg = f"no plan runs in {wanted:.0%} of the time: raise the latency budget or allow more formats"
        raise BudgetError(msg)
    if strict and not best.met:
        msg = (
            f"the latency budget of {wanted:.0%} is not met: the best plan measures {1 / best.speedup.ratio:.1%}. "
            "Raise the budget, or allow more formats or layers."
        )
        raise BudgetError(msg)
    return best
