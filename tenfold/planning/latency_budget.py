"""Plans that meet a latency budget as measured, no layer slower than its dense original."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import nn

from tenfold.allocation import choose, limits_latency
from tenfold.errors import BudgetError
from tenfold.layers import FactorizedLayer, stage_specs
from tenfold.planning.late import in_vain
from tenfold.planning.layer_bench import Gated, LayerBench, LayerTiming, keep_slower_layers_dense
from tenfold.planning.target import Target
from tenfold.planning.timing import Timing
from tenfold.profiling import Comparison, LatencyTable, compare_latency
from tenfold.profiling.latency.layer_timer import fill_neutral_
from tenfold.records import Budget, Latency, LayerPlan, OptionTable, Plan, Profile, Speedup
from tenfold.runtimes import Compare
from tenfold.surgery import fuse_batchnorm_, fused_pairs, restructure_
from tenfold.tracing import copied

_LOG = logging.getLogger("tenfold")
_SLACK = 0.02  # a plan may stay this far below the allowance before another one is chosen with more
_AIM = 0.99  # of the allowance: measurements scatter
_RELAX = 1.1
_OTHER_FORMAT = 1.05  # how much faster another memory format must be


@dataclass(frozen=True)
class FastPlan:
    """A plan and the measurements that stand behind it.

    Attributes:
        plan: what to do; its layers have their measured times.
        before: the model as it is, in its best memory format.
        after: the smaller model, in the memory format that it is to run in.
        speedup: how many times faster, measured in turns.
        layers: timing of every factorized layer.
        returned: timing of the layers that stay dense because they were not faster.
        met: whether the latency budget is met; True when there is none.
        rounds: how many plans were made and measured as a whole.
        timing: what the plan went by.
    """

    plan: Plan
    before: Latency
    after: Latency
    speedup: Speedup
    layers: dict[str, LayerTiming]
    returned: dict[str, LayerTiming]
    met: bool
    rounds: int
    timing: Timing

    @property
    def share(self) -> float:
        """The measured time, as a share of what it was."""
        return 1 / self.speedup.ratio


@dataclass(frozen=True)
class LatencySearch:
    """How hard to look for a plan that meets a latency.

    Attributes:
        strict: raise if the latency cannot be met; otherwise come as near as the layers allow, as long as the model
            measures faster at all.
        rounds: how many plans to measure as a whole, at most.
        seconds: about how long to time the models in a round.
        layer_seconds: about how long to time a layer.
        compare: ``compare_latency``, or something in its place.
    """

    strict: bool = True
    rounds: int = 5
    seconds: float = 4.0
    layer_seconds: float = 0.4
    compare: Compare = compare_latency


def plan_within_latency(
    model: nn.Module,
    table: OptionTable,
    inputs: Any,
    target: Target,
    search: LatencySearch | None = None,
) -> FastPlan:
    """Return a plan whose layers all measure faster than dense ones and whose model meets its latency as measured.

    Chooses by the lookup table, times every factorized layer against its original, then the model as a whole; where the
    whole differs from what the table predicted, the limit is moved by as much and the plan chosen again. The whole is
    timed on the structure alone, with made-up factors: nothing is decomposed yet.

    Args:
        model: the model that was profiled, on its device.
        table: its options, and the recipe with the budget: without a latency there, layers that measure slower are kept
            dense and that is all. With ``fuse_batchnorm`` both models are measured with batch norm fused, and
            ``plan.fused`` says what to fuse.
        inputs: what latencies are measured on, which may be of another batch size than what the table counts.
        target: the runtime, and its clock in the memory format in which the smaller model is to run; where the first
            plan runs faster in another one, a clock like it for that format takes over.
        search: how hard to look.

    Raises:
        BudgetError: the budget cannot be met.
    """
    search = search or LatencySearch()
    runs = model
    if table.recipe.fuse_batchnorm:
        runs = copied(model).eval()
        fuse_batchnorm_(runs, inputs)
    state = _State(model, runs, table, inputs, target, search)
    timing = state.timing()
    if not limits_latency(table.recipe):
        found, better = state.attempt(timing, 1)
        if better is None:
            return found
        state = state.in_format(better)
        return state.attempt(state.timing(), 2)[0]
    wanted = table.recipe.budget.allowance(table.before, timing.dense_ms, table.bytes)["latency"] / timing.dense_ms
    tried: list[FastPlan] = []
    reached = timing.tighten  # the last factor on the allowance at which there was a plan
    for number in range(1, search.rounds + 1):
        try:
            found, better = state.attempt(timing, number)
        except BudgetError:
            if not tried and (search.strict or number == search.rounds):
                raise
            loose = reached if tried else timing.tighten * _RELAX**2
            timing = timing.tightened((loose / timing.tighten) ** 0.5)
            continue
        if better is not None and number == 1 < search.rounds:
            state = state.in_format(better)
            timing = state.timing()
            continue
        _LOG.info("plan %d runs in %.3f of the time, allowed are %.3f", number, found.share, wanted)
        tried.append(found)
        if (1 - _SLACK) * wanted <= found.share <= wanted:
            break
        reached = timing.tighten
        # the lookup table learns with every plan: what it says of the earlier ones now is what can be compared
        shares = [(timing.share_of(f.plan), f.share) for f in tried]
        timing = timing.tightened(next_share(shares, wanted) / (wanted * timing.tighten))
    return _best_of(tried, wanted, strict=search.strict)


def next_share(history: list[tuple[float, float]], wanted: float) -> float:
    """Return the predicted share of the time to plan for next, from (predicted, measured) shares of plans so far.

    In proportion at first; between the nearest two once there are some on both sides of what is wanted. The more plans
    have missed it, the further below it the next one aims: ranks in blocks come in large steps, and times scatter.

    Example:
        >>> round(next_share([(0.5, 0.6)], 0.5), 3), round(next_share([(0.5, 0.6), (0.4, 0.4)], 0.5), 3)
        (0.413, 0.448)
    """
    misses = sum(measured > wanted for _, measured in history)
    aim = _AIM ** max(1, misses) * wanted
    below = max((pair for pair in history if pair[1] <= wanted), key=lambda pair: pair[1], default=None)
    above = min((pair for pair in history if pair[1] > wanted), key=lambda pair: pair[1], default=None)
    if below is None or above is None or below[0] >= above[0]:
        predicted, measured = history[-1]
        return predicted * aim / measured
    part = min(0.9, max(0.1, (aim - below[1]) / (above[1] - below[1])))
    return below[0] + part * (above[0] - below[0])


@dataclass(frozen=True, eq=False)
class _State:
    """What stays the same from round to round.

    Decided is by the weights of ``model``; what ``runs`` is timed, with its batch norms fused where that is asked for.
    """

    model: nn.Module
    runs: nn.Module
    table: OptionTable
    inputs: Any
    target: Target
    search: LatencySearch
    formats: dict[str, tuple[str, str]] = field(default_factory=dict)  # the best, by that of the clock
    built: dict[str, tuple[nn.Module, Any]] = field(default_factory=dict)  # the model as it is, by memory format

    @property
    def clock(self) -> LatencyTable:
        return self.target.clock

    @property
    def profile(self) -> Profile:
        return self.target.profile

    @property
    def budget(self) -> Budget:
        return self.table.recipe.budget

    @cached_property
    def bench(self) -> LayerBench:
        """Times layers as the clock does, each geometry once."""
        target, search = self.target, self.search
        return LayerBench(self.profile, target.runtime, target.at, search.layer_seconds, compare=search.compare)

    def timing(self) -> Timing:
        """Return the timing of the model as it is."""
        return Timing.of(
            self.runs,
            self.inputs,
            self.target,
            seconds=self.search.seconds,
            compare=self.search.compare,
        )

    def in_format(self, name: str) -> _State:
        """Return the same search for a smaller model that runs in another memory format."""
        return replace(self, target=self.target.in_format(name))

    def attempt(self, timing: Timing, number: int) -> tuple[FastPlan, str | None]:
        """Return a plan without slower layers, measured as a whole; and a memory format if another one is better."""
        if self.table.recipe.gated:
            gated = keep_slower_layers_dense(
                lambda reasons: self._plan(timing, reasons), self.bench, learn=self._learner()
            )
        else:
            gated = Gated(self._plan(timing, {}), {}, {})
        plan = gated.plan.replace(fused=fused_pairs(self.runs))
        small = with_structure(self.runs, plan)
        own = self.clock.memory_format
        if own not in self.formats:
            self.formats[own] = self._best_formats(small)
        dense, best = self.formats[own]
        final = self._compared(
            {
                "before": self._dense(dense),
                "after": self.target.ready(small, self.inputs, own),
            }
        )
        found = FastPlan(
            plan=plan,
            before=final.latencies["before"],
            after=final.latencies["after"],
            speedup=final.speedups["after"],
            layers=gated.timings,
            returned=gated.returned,
            met=self._met(final.speedups["after"], timing),
            rounds=number,
            timing=timing,
        )
        return found, None if best == own else best

    def _dense(self, name: str) -> tuple[nn.Module, Any]:
        """Return the model as it is in a memory format, built once: runtimes may take long for that."""
        if name not in self.built:
            self.built[name] = self.target.ready(self.runs, self.inputs, name)
        return self.built[name]

    def _best_formats(self, small: nn.Module) -> tuple[str, str]:
        """Return the memory formats for the model as it is and the smaller one, which moves only for a good gain."""
        names = self.target.runtime.memory_formats(self.inputs)
        if len(names) == 1:
            return names[0], names[0]
        models = {"before": self.runs, "after": small}
        variants = {
            (kind, n): self.target.ready(model, self.inputs, n) for kind, model in models.items() for n in names
        }
        times = self._compared({f"{kind} {n}": variant for (kind, n), variant in variants.items()}).latencies
        dense, best = (min(names, key=lambda n: times[f"{kind} {n}"].median_ms) for kind in models)
        own = self.clock.memory_format
        gain = times[f"after {own}"].median_ms / times[f"after {best}"].median_ms
        return dense, best if gain > _OTHER_FORMAT else own

    def _compared(self, variants: dict[str, tuple[nn.Module, Any]]) -> Comparison:
        return self.search.compare(variants, seconds=self.search.seconds, threads=self.clock.threads)

    def _plan(self, timing: Timing, reasons: Mapping[str, str]) -> Plan:
        table = timing.time(self.table.kept(dict(reasons)))
        return choose(table if limits_latency(table.recipe) or not table.recipe.gated else table.faster())

    def _learner(self) -> Callable[[LayerPlan, LayerTiming], None] | None:
        if "latency" not in self.budget.limited:
            return None  # the plan does not look at the clock: it would choose the same again

        def learn(layer: LayerPlan, measured: LayerTiming) -> None:
            known = self.profile.layer(layer.path)
            if known.spec is not None and len(known.calls) == 1:
                in_shape = known.calls[0].in_shape
                self.clock.learn(str(layer.format), known.spec, in_shape, layer.rank or {}, 1 / measured.ratio)

        return learn

    def _met(self, speedup: Speedup, timing: Timing) -> bool:
        if not limits_latency(self.table.recipe):
            return True
        allowed = self.budget.allowance(self.table.before, timing.dense_ms, self.table.bytes)["latency"]
        return timing.dense_ms / speedup.ratio <= allowed


def with_structure(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of the model that has the layers of the plan with made-up factors: to time, not to use."""
    small = restructure_(copied(model), plan)
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


def _best_of(tried: list[FastPlan], wanted: float, *, strict: bool) -> FastPlan:
    """Return the plan that meets the budget with the least to spare; failing that, the fastest."""
    if not tried:
        msg = f"no plan runs in {wanted:.0%} of the time: raise the latency budget or allow more formats"
        raise BudgetError(msg)
    best = max(tried, key=lambda plan: (plan.met, plan.share if plan.met else -plan.share))
    if best.speedup.ratio <= 1 or (strict and not best.met):
        raise BudgetError(in_vain(best, wanted))
    return best
