"""Convert a whole-model latency budget into per-layer milliseconds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from tenfold.formats import Rank
from tenfold.planning.target import Target
from tenfold.planning.unit_times import time_unit
from tenfold.profiling import LatencyTable, compare_latency
from tenfold.records import (
    Call,
    FormatOptions,
    ForwardTime,
    LayerOptions,
    LayerProfile,
    LayerSpec,
    OptionTable,
    Plan,
    Profile,
)
from tenfold.runtimes import Compare


@dataclass(frozen=True)
class _Timed:
    """What the clock wants to know of a layer."""

    spec: LayerSpec
    formats: tuple[str, ...]
    calls: tuple[Call, ...]


@dataclass(frozen=True, eq=False)
class Timing:
    """Converts a whole-model latency budget into per-layer milliseconds.

    All is in milliseconds of the clock, in which layers are timed one by one. A whole model differs from their sum
    (cold caches, activations between them); so of the model only ratios are taken, each from measurements in turns or
    within one forward. What is spent outside of layers is what no plan changes.

    Attributes:
        target: the runtime, and the clock that times layers there, in the memory format that the smaller model is to
            run in.
        layer_share: the part of a forward spent in layers with a geometry, in (0, 1].
        dense_ms: one forward of the model as it is, in the memory format that is best for it.
        best_share: that time as a share of the one in the clock's memory format, at most 1.
        tighten: factor on what is allowed, below 1 when earlier plans measured slower than predicted.
    """

    target: Target
    layer_share: float
    dense_ms: float
    best_share: float = 1.0
    tighten: float = 1.0

    @classmethod
    def of(
        cls,
        model: nn.Module,
        inputs: Any,
        target: Target,
        *,
        seconds: float = 4.0,
        compare: Compare | None = None,
    ) -> Timing:
        """Return the timing of a model, measured in every memory format that matters for these inputs.

        Example:
            >>> import torch
            >>> from tenfold.records import Recipe
            >>> from tenfold.runtime import Runtime
            >>> net, x = nn.Linear(4, 4), torch.zeros(2, 4)
            >>> clock = LatencyTable(cache=None, timer=lambda spec, shape: 1.0, model_timer=lambda model, inputs: 5.0)
            >>> target = Target.of(Recipe(), net, x, Runtime(clock=clock))
            >>> Timing.of(net, x, target, seconds=0.1).layer_share
            0.2
        """
        clock, layers = target.clock, [x for x in target.profile.layers if x.calls and x.path not in target.refused]
        variants = {name: target.ready(model, inputs, name) for name in target.runtime.memory_formats(inputs)}
        result = (compare or compare_latency)(variants, seconds=seconds, threads=clock.threads)
        times = {name: latency.median_ms for name, latency in result.latencies.items()}
        best = min(times.values())
        if target.runtime.observable:
            share = clock.share_of_layers(*variants[clock.memory_format], layers, seconds=seconds / 2)
        else:
            alone = sum(clock.layer_ms(layer.spec, layer.calls) for layer in layers if layer.spec is not None)
            share = min(1.0, alone / best)
        return cls(target, share, best, best / times.get(clock.memory_format, best))

    @property
    def profile(self) -> Profile:
        """The profile of the model as it is."""
        return self.target.profile

    @property
    def clock(self) -> LatencyTable:
        """What times layers."""
        return self.target.clock

    def time(self, table: OptionTable) -> OptionTable:
        """Return the table with what its layers take now and as each of their options; measures what is missing."""
        used = [(layer, self.profile.layer(layer.path)) for layer in table.eligible]
        self.clock.prepare(
            [
                _Timed(known.spec, tuple(o.format for o in layer.options), known.calls)
                for layer, known in used
                if known.spec
            ]
        )
        timed = {layer.path: self._timed(layer, known) for layer, known in used}
        # What is kept is in the forward's time already; layer by layer it says what a budget fails for.
        layers = tuple(
            timed.get(layer.path) or layer.replace(latency_ms=self.now_ms(self.profile.layer(layer.path)))
            for layer in table.layers
        )
        units = tuple(time_unit(own, self.profile, self.clock, self.now_ms) for own in table.units)
        return table.replace(layers=layers, time=self.forward_time(), units=units)

    def share_of(self, plan: Plan) -> float:
        """Return what share of the model's time a plan should take, by all that the clock has learnt until now."""
        whole = self.forward_time().whole_ms
        alone = (layer for layer in plan.factorized if layer.path not in plan.narrowed_paths)
        planned = ((layer, self.profile.layer(layer.path)) for layer in alone)
        saved = sum((unit.latency_before_ms or 0.0) - (unit.latency_after_ms or 0.0) for unit in plan.narrowed)
        saved += sum(
            self.now_ms(known) - self._in(str(layer.format), layer.rank or {}, known)
            for layer, known in planned
            if known.spec is not None and known.calls
        )
        return (whole - saved) / (whole * self.best_share)

    def forward_time(self) -> ForwardTime:
        """Return what a latency budget is converted with, as a record."""
        shapes = self.profile.input_shapes
        return ForwardTime(
            dense_ms=self.dense_ms,
            whole_ms=sum(self.now_ms(layer) for layer in self.profile.layers) / self.layer_share,
            best_share=self.best_share,
            tighten=self.tighten,
            batch_size=shapes[0][0] if shapes and shapes[0] else None,
        )

    def tightened(self, factor: float) -> Timing:
        """Return the same timing with an allowance that is ``factor`` times as large."""
        return replace(self, tighten=self.tighten * factor)

    def _timed(self, layer: LayerOptions, known: LayerProfile) -> LayerOptions:
        return layer.replace(
            latency_ms=self.now_ms(known),
            options=tuple(self._with_latencies(own, known) for own in layer.options),
        )

    def _with_latencies(self, options: FormatOptions, known: LayerProfile) -> FormatOptions:
        fuller = None if options.fuller is None else self._with_latencies(options.fuller, known)
        return options.replace(latency_ms=self._column(options, known), fuller=fuller)

    def _column(self, options: FormatOptions, known: LayerProfile) -> NDArray[np.float64]:
        if known.spec is None or not len(options):
            return np.zeros(len(options))
        ranks = [options.rank(i) for i in range(len(options))]
        return np.asarray(self.clock.predict(options.format, known.spec, known.calls, ranks))

    def now_ms(self, layer: LayerProfile) -> float:
        """Return what a layer takes as it is; nothing where it is not timed."""
        if layer.spec is None or not layer.calls or layer.path in self.target.refused:
            return 0.0
        if layer.format is None or layer.rank is None:
            return self.clock.layer_ms(layer.spec, layer.calls)
        return self._in(layer.format, layer.rank, layer)

    def _in(self, format: str, rank: Rank, layer: LayerProfile) -> float:
        """Return what a layer with a geometry takes in a format."""
        if layer.spec is None:
            return 0.0
        return float(self.clock.predict(format, layer.spec, layer.calls, [rank])[0])
