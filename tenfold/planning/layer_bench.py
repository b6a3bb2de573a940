"""Never slower: every factorized layer is timed against its dense original, and what does not win stays dense."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tenfold.errors import PlanError
from tenfold.formats import FORMATS
from tenfold.profiling import compare_latency
from tenfold.records import LayerPlan, LayerSpec, Plan, Profile, Shape
from tenfold.runtimes import Compare, Conditions, LayerPair, TargetRuntime, runtime_named

MARGIN = 0.02
_RETRY = 4.0


@dataclass(frozen=True)
class LayerTiming:
    """A layer before and after, measured in turns: milliseconds of one forward's calls, and how many times faster.

    ``low`` and ``high`` bound the true ``ratio`` with a confidence of 95 %.
    """

    before_ms: float
    after_ms: float
    ratio: float
    low: float
    high: float

    def faster(self, margin: float = MARGIN) -> bool:
        """Whether the layer is faster by the margin, and surely faster at all.

        Example:
            >>> LayerTiming(2.0, 1.0, 2.0, low=1.9, high=2.1).faster(), LayerTiming(1.0, 0.9, 1.1, 0.9, 1.3).faster()
            (True, False)
        """
        return self.ratio >= 1 + margin and self.low > 1

    def decided(self, margin: float = MARGIN) -> bool:
        """Whether more measurements would hardly change the answer."""
        return self.faster(margin) or self.high < 1 + margin


@dataclass(eq=False)
class LayerBench:
    """Times the factorized layers of plans against their dense originals; each distinct geometry once.

    Layers have made-up weights, the same everywhere: only shapes, dtype and memory format matter.

    Attributes:
        profile: has the calls of every layer.
        runtime: what it is to run in.
        at: how it is to run there.
        seconds: about how long to measure a layer; what stays undecided is measured again, four times as long.
        margin: by how much a layer has to be faster.
        compare: ``compare_latency``, or something in its place.
    """

    profile: Profile
    runtime: TargetRuntime = field(default_factory=lambda: runtime_named("torch"))
    at: Conditions = field(default_factory=Conditions)
    seconds: float = 0.4
    margin: float = MARGIN
    compare: Compare = compare_latency
    _known: dict[Any, LayerTiming] = field(default_factory=dict, repr=False)

    def __call__(self, plan: Plan) -> dict[str, LayerTiming]:
        """Return the timing of every layer that the plan factorizes alone, by path: units were timed as they are.

        Raises:
            PlanError: the plan has a layer that the profile does not have.
        """
        return {layer.path: self._layer(layer) for layer in plan.factorized if layer.path not in plan.narrowed_paths}

    def _layer(self, layer: LayerPlan) -> LayerTiming:
        known = self.profile.layer(layer.path)
        if known.spec is None:
            msg = f"layer {layer.path!r} cannot be factorized: {known.note}"
            raise PlanError(msg)
        calls = [(call.count, self._one(known.spec, call.in_shape, layer)) for call in known.calls]
        return calls[0][1] if len(calls) == 1 and calls[0][0] == 1 else together(calls)

    def _one(self, spec: LayerSpec, in_shape: Shape, layer: LayerPlan) -> LayerTiming:
        key = (spec, in_shape, layer.format, tuple(sorted((layer.rank or {}).items())))
        if key not in self._known:
            self._known[key] = self._measure(spec, in_shape, layer)
        return self._known[key]

    def _measure(self, spec: LayerSpec, in_shape: Shape, layer: LayerPlan) -> LayerTiming:
        format, rank = str(layer.format), layer.rank or {}
        stages = FORMATS.get(format).structure(spec, FORMATS.get(format).check_rank(spec, rank))
        pair = LayerPair(spec, format, rank, in_shape, tuple(stages))
        timing = self._compared(pair, self.seconds)
        return timing if timing.decided(self.margin) else self._compared(pair, _RETRY * self.seconds)

    def _compared(self, pair: LayerPair, seconds: float) -> LayerTiming:
        result = self.runtime.compare_layer(pair, self.at, seconds=seconds, compare=self.compare)
        speedup = result.speedups["factorized"]
        before, after = (result.latencies[name].median_ms for name in ("dense", "factorized"))
        return LayerTiming(before, after, speedup.ratio, speedup.low, speedup.high)


def together(calls: Iterable[tuple[int, LayerTiming]]) -> LayerTiming:
    """Return the timing of several calls of one layer, each with its count.

    Example:
        >>> one = LayerTiming(2.0, 1.0, 2.0, 1.9, 2.1)
        >>> together([(3, one)]).before_ms, together([(3, one)]).ratio
        (6.0, 2.0)
    """
    calls = list(calls)
    before = sum(n * t.before_ms for n, t in calls)
    after = sum(n * t.after_ms for n, t in calls)

    def ratio(of: Callable[[LayerTiming], float]) -> float:
        return before / sum(n * t.before_ms / of(t) for n, t in calls)

    return LayerTiming(before, after, ratio(lambda t: t.ratio), ratio(lambda t: t.low), ratio(lambda t: t.high))


@dataclass(frozen=True)
class Gated:
    """A plan without a slower layer, the timing of its layers, and the timings of those that were sent back."""

    plan: Plan
    timings: dict[str, LayerTiming]
    returned: dict[str, LayerTiming]


def keep_slower_layers_dense(
    make: Callable[[Mapping[str, str]], Plan],
    check: Callable[[Plan], Mapping[str, LayerTiming]],
    *,
    margin: float = MARGIN,
    learn: Callable[[LayerPlan, LayerTiming], None] | None = None,
) -> Gated:
    """Return a plan in which every factorized layer measures faster than its dense original.

    Plan, measure, plan again without the layers that did not win, until all do. Each of those is kept with what was
    measured as its reason.

    Args:
        make: returns a plan that keeps some layers, by path, for these reasons.
        check: returns the timing of every factorized layer, by path; see ``LayerBench``.
        margin: by how much a layer has to be faster.
        learn: called with every timing once per round. With it, a layer gets a second chance at other ranks before
            it stays dense: ``make`` is expected to do better with what was learned.
    """
    reasons: dict[str, str] = {}
    returned: dict[str, LayerTiming] = {}
    seen: set[tuple[str, str, str]] = set()
    warned: set[str] = set()
    while True:
        plan = make(reasons)
        timings = dict(check(plan))
        slower = [
            layer for layer in plan.factorized if layer.path in timings and not timings[layer.path].faster(margin)
        ]
        if learn is not None:
            for layer in (layer for layer in plan.factorized if layer.path in timings):
                if (measured := (layer.path, str(layer.format), str(layer.rank))) not in seen:
                    seen.add(measured)
                    learn(layer, timings[layer.path])
        if not slower:
            return Gated(_with_times(plan, timings), timings, returned)
        for layer in slower:
            if learn is None or layer.path in warned:
                reasons[layer.path] = _reason(layer, timings[layer.path])
                returned[layer.path] = timings[layer.path]
            warned.add(layer.path)


def _reason(layer: LayerPlan, timing: LayerTiming) -> str:
    rank = ",".join(f"{k}={v}" for k, v in (layer.rank or {}).items())
    doubt = (
        "" if timing.ratio < 1 else f" ({timing.ratio:.2f} times faster, 95 % {timing.low:.2f} to {timing.high:.2f})"
    )
    return (
        f"{layer.format} {rank} measures {timing.after_ms:.3g} ms, dense {timing.before_ms:.3g} ms{doubt}: kept dense"
    )


def _with_times(plan: Plan, timings: Mapping[str, LayerTiming]) -> Plan:
    layers = tuple(
        layer.replace(
            latency_before_ms=timings[layer.path].before_ms,
            latency_after_ms=timings[layer.path].after_ms,
        )
        if layer.path in timings
        else layer
        for layer in plan.layers
    )
    return plan.replace(layers=layers)
