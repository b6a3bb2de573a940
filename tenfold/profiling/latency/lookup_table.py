"""Latency lookup table: milliseconds of layers on the target, dense and at every rank, from timed sub-layers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from math import exp, log
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tenfold.formats import Rank
from tenfold.profiling.environment import device_name
from tenfold.profiling.latency.cache import LatencyCache
from tenfold.profiling.latency.grid import LEVELS, Curve, MeasurementGrid, Point, measurement_grid, stage_columns
from tenfold.profiling.latency.layer_timer import LayerTimer, Timer
from tenfold.profiling.latency.measure import layer_latency, using_threads
from tenfold.profiling.latency.monotone import MonotoneFit
from tenfold.profiling.latency.steps import probe_points, step_from
from tenfold.records import Call, LayerProfile, LayerSpec, Shape
from tenfold.tracing.layers import Entry, entries

CACHE = "~/.cache/tenfold/latency"
# Reference that every sample is paired with: a typical convolution, half a millisecond on one CPU core.
REFERENCE = Point(
    LayerSpec(kind="conv", in_channels=64, out_channels=64, kernel=(3, 3), padding=(1, 1)), (1, 64, 28, 28)
)

_MOST_CORRECTION = 2.0
_STEP_REPEATS = 5

Array = NDArray[np.float64]
Place = tuple[str, LayerSpec, Shape]  # a format for a layer on an input shape
Progress = Callable[[int, int], None]
_LOG = logging.getLogger("tenfold")


class Timed(Protocol):
    """A layer to be timed in several formats, such as a rank problem."""

    @property
    def spec(self) -> LayerSpec:
        """Geometry of the dense layer."""

    @property
    def formats(self) -> tuple[str, ...]:
        """Names of the formats that it may get."""

    @property
    def calls(self) -> tuple[Call, ...]:
        """Its inputs in one forward."""


@dataclass(eq=False)
class LatencyTable:
    """Milliseconds of layer geometries on one device, in one dtype, memory format and number of threads.

    A factorized layer takes as long as its sub-layers one after the other, and each of them is a plain layer that many
    layers share: the table holds sub-layers. Ranks in between are interpolated so that time never falls with a rank.

    Every sample is divided by a reference convolution timed right before and after it, so that drift of the machine
    cancels out; milliseconds are in units of that reference as it was when this object first measured. Tables are kept
    on disk, by device, versions, dtype, threads and memory format.

    Args:
        device: where the model is to run.
        dtype: of weights and activations.
        threads: CPU threads; as many as torch uses now if None.
        memory_format: ``contiguous``, ``channels_last`` or ``channels_last_3d``.
        cache: the folder for the tables; None keeps them in memory.
        seconds: upper bound on the time to measure, over the life of the object; dense layers are timed once in any
            case.
        repeats: how many samples a point gets if there is time.
        step: channels come in multiples of this on the device; see ``step_of``.
        runtime: name of the runtime that layers are timed in.
        versions: of the packages that the runtime is made of.
        timer: returns milliseconds of a sub-layer; that of eager torch if None.
        model_timer: returns milliseconds of a model on inputs; that of eager torch if None.
        progress: called with (samples taken, samples planned).

    Example:
        >>> table = LatencyTable(cache=None, timer=lambda spec, in_shape: 1.0 + spec.macs(in_shape) / 1000)
        >>> layer = LayerSpec(kind="linear", in_channels=64, out_channels=64)
        >>> calls = (Call(in_shape=(1, 64)),)
        >>> table.predict("low_rank", layer, calls, [{"rank": 8}, {"rank": 16}]).round(2).tolist()
        [3.02, 4.05]
    """

    _: KW_ONLY
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    threads: int | None = None
    memory_format: str = "contiguous"
    cache: Path | str | None = CACHE
    seconds: float = 60.0
    repeats: int = 3
    step: int = 8
    runtime: str = "torch"
    versions: Mapping[str, str] = field(default_factory=dict)
    timer: Timer | None = None
    model_timer: Callable[[nn.Module, Any], float] | None = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        self.threads = torch.get_num_threads() if self.threads is None else self.threads
        self._timer = self.timer or LayerTimer(self.device, self.dtype, self.memory_format)
        self._cache = LatencyCache(self.cache, self.conditions)
        self._samples = self._cache.load()
        self._unsaved: set[str] = set()
        self._spent = 0.0
        self._reference = 0.0  # its milliseconds when first measured
        self._last = 0.0  # and a moment ago
        self._grids: dict[Place, MeasurementGrid] = {}
        self._prepared: set[Place] = set()
        self._fits: dict[Curve, MonotoneFit] = {}
        self._known: dict[Point, None] = {}
        self._chains: dict[Place, list[float]] = {}
        self._steps: dict[tuple[str, int], int] = {}

    @property
    def conditions(self) -> dict[str, Any]:
        """All that the times depend on, except the shapes."""
        device = torch.device(self.device)
        return {
            "device": device.type,
            "name": device_name(device),
            "torch": str(torch.__version__),
            **({} if self.runtime == "torch" else {"runtime": self.runtime, **self.versions}),
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": self.threads,
            "memory_format": self.memory_format,
        }

    @property
    def torch_device(self) -> torch.device:
        """The device that layers run on."""
        return torch.device(self.device)

    def in_format(self, memory_format: str) -> LatencyTable:
        """Return a table with the same settings for another memory format."""
        return replace(self, memory_format=memory_format)

    def step_of(self, spec: LayerSpec) -> int:
        """Return what numbers of channels of such layers should be multiples of; 1 where none is better than others.

        Kernels that work on blocks of channels take as long for one more as for a whole block more. Measured on a
        narrow layer between two wide ones, once for every kind of layer; see ``tenfold.profiling.latency.steps``.
        """
        kind = (spec.kind, spec.axes)
        if kind not in self._steps:
            probes = probe_points(spec)
            self._measure([point for points in probes.values() for point in points], _STEP_REPEATS)
            times = {  # the least: other load only adds
                rank: sum(min(self._samples[point.key]) for point in points)
                for rank, points in probes.items()
                if all(point.key in self._samples for point in points)
            }
            self._steps[kind] = step_from(times)
        return self._steps[kind]

    def layer_ms(self, spec: LayerSpec, calls: Sequence[Call]) -> float:
        """Return the milliseconds of the dense layer in one forward, all its calls together."""
        points = [Point.of(spec, call.in_shape) for call in calls]
        self._measure([p for p in points if p.key not in self._samples], 1, bounded=False)
        return sum(self._ms(p) * call.count for p, call in zip(points, calls, strict=True))

    def predict(self, format: str, spec: LayerSpec, calls: Sequence[Call], ranks: Sequence[Rank]) -> Array:
        """Return the milliseconds of the layer in one forward in this format, one number for each rank.

        Geometries that were not prepared are measured now, coarsely.
        """
        total = np.zeros(len(ranks))
        for call in calls:
            total += call.count * self._predict(format, spec, call.in_shape, ranks)
        return total

    def prepare(self, problems: Sequence[Timed]) -> None:
        """Measure the sub-layers of these layers: coarsely first, then finer and repeatedly while there is time."""
        places = list(
            dict.fromkeys(
                (format, problem.spec, call.in_shape)
                for problem in problems
                for format in problem.formats
                for call in problem.calls
            )
        )
        dense = list(dict.fromkeys(Point.of(p.spec, call.in_shape) for p in problems for call in p.calls))
        self._measure(dense, 1, bounded=False)
        self._prepared.update(places)
        for level in range(LEVELS):
            points = list(dict.fromkeys(p for place in places for p in self._grid(place).levels[level]))
            if not self._measure([*dense, *points], 1 if level == 0 else self.repeats):
                break
        self.save()

    def learn(self, format: str, spec: LayerSpec, in_shape: Shape, rank: Rank, measured: float) -> None:
        """Correct predictions by a measurement: the whole layer took ``measured`` times as long as the dense one.

        What sub-layers timed one by one do not show, such as changes of the memory layout between them, is taken as a
        factor that all ranks of the geometry share: the geometric mean of its measurements. Geometries and formats
        without one take the mean of the others.
        """
        place = (format, spec, in_shape)
        predicted = self._sum_of_sublayers(place, [rank])[0]
        target = measured * self._ms(Point.of(spec, in_shape))
        factor = min(_MOST_CORRECTION, max(1 / _MOST_CORRECTION, target / predicted))
        self._chains.setdefault(place, []).append(log(factor))

    def share_of_layers(
        self, model: nn.Module, inputs: Any, layers: Sequence[LayerProfile], *, seconds: float = 2.0
    ) -> float:
        """Return the share of a forward, in (0, 1], that is spent in layers with a geometry.

        Both sides of the ratio are measured within the same forwards, so that a busy machine and caches affect both.
        """
        if self.model_timer is not None:
            alone = sum(self.layer_ms(layer.spec, layer.calls) for layer in layers if layer.spec is not None)
            return min(1.0, alone / self.model_timer(model, inputs))
        timed = [entry for entry in entries(model) if entry.spec is not None and entry.path]
        if not timed:
            return 1.0
        whole = Entry(path="", aliases=(), tied=(), module=model, spec=None, reason="", params=0, bytes=0)
        times = layer_latency(model, inputs, [whole, *timed], seconds=seconds, threads=self.threads)
        rest = times.pop("").median_ms
        inside = sum(time.median_ms for time in times.values())
        return max(inside / (inside + rest), 1e-3)

    def save(self) -> None:
        """Write new samples to the cache."""
        if self._unsaved:
            self._cache.save({key: self._samples[key] for key in self._unsaved})
            self._unsaved.clear()

    def _predict(self, format: str, spec: LayerSpec, in_shape: Shape, ranks: Sequence[Rank]) -> Array:
        place = (format, spec, in_shape)
        return self._sum_of_sublayers(place, ranks) * exp(self._chain(place))

    def _chain(self, place: tuple[str, LayerSpec, Shape]) -> float:
        """Return the logarithm of the time of a whole layer over the sum of its sub-layers, as learned."""
        # Without the average, plans would move from what was measured slow to what is merely not known to be slow.
        own = self._chains.get(place)
        logs = own or [sum(noted) / len(noted) for noted in self._chains.values()]
        return sum(logs) / len(logs) if logs else 0.0

    def _sum_of_sublayers(self, place: Place, ranks: Sequence[Rank]) -> Array:
        format, spec, in_shape = place
        grid = self._grid(place)
        if place not in self._prepared:
            self._prepared.add(place)
            self._measure([Point.of(spec, in_shape)], 1, bounded=False)
            self._measure(grid.levels[0], 1)
        total = np.zeros(len(ranks))
        for point, rows, x, y in stage_columns(format, spec, in_shape, ranks):
            curve = grid.curve(point, x, y)
            if curve is None:  # beyond the sampled ranks: more expensive than the dense layer
                self._known.setdefault(point)  # maybe the only one of its family: slices and groups depend on ranks
                curve = Curve(point.family, tuple(np.unique(x).tolist()), tuple(np.unique(y).tolist()))
            np.add.at(total, rows, self._fit(curve, point, Point.of(spec, in_shape))(x, y))
        return total

    def _grid(self, place: Place) -> MeasurementGrid:
        if place not in self._grids:
            step = self._steps.get((place[1].kind, place[1].axes), 1)
            self._grids[place] = measurement_grid(*place, step=max(step, self.step), exact=step >= self.step)
            self._known |= dict.fromkeys(p for level in self._grids[place].levels for p in level)
        return self._grids[place]

    def _fit(self, curve: Curve, point: Point, dense: Point) -> MonotoneFit:
        if curve not in self._fits:
            family = [p for p in self._known if p.family == curve.family]
            near = [p for p in family if p.key in self._samples]
            points = {p.at: self._ms(p) for p in near if curve.holds(*p.at)} or {p.at: self._ms(p) for p in near}
            if len(points) < 2:
                if len(near) < len(family):  # otherwise no more than one of its ranks makes the layer cheaper
                    said = "no time was left to measure %s: taken in proportion to the dense layer"
                    _LOG.warning(said, curve.family)
                share = self._ms(dense) / max(1, dense.spec.macs(dense.in_shape))
                guessed = {p.at: share * max(1, p.spec.macs(p.in_shape)) for p in family if curve.holds(*p.at)}
                points = guessed | points or _in_proportion(curve, point, share)
            self._fits[curve] = MonotoneFit.through(curve.xs, curve.ys, points)
        return self._fits[curve]

    def _ms(self, point: Point) -> float:
        if not self._reference:
            self._pulse()
        return median(self._samples[point.key]) * self._reference

    def _measure(self, points: Sequence[Point], repeats: int, *, bounded: bool = True) -> bool:
        """Take samples in turns until every point has ``repeats``; return whether the time was enough."""
        self._known |= dict.fromkeys(points)
        missing = {p: repeats - len(self._samples.get(p.key, ())) for p in points}
        queue = [p for turn in range(repeats) for p in points if missing[p] > turn]
        with using_threads(self.threads):
            for done, point in enumerate(queue):
                if bounded and self._spent >= self.seconds:
                    return False
                start = time.perf_counter()
                sample = self._sample(point)
                self._samples.setdefault(point.key, []).append(sample)
                self._unsaved.add(point.key)
                self._spent += time.perf_counter() - start
                if self.progress is not None:
                    self.progress(done + 1, len(queue))
        if queue:
            self._fits.clear()
        return True

    def _sample(self, point: Point) -> float:
        """Return the time of a sub-layer in units of the reference."""
        before = self._last or self._pulse()
        measured = self._timer(point.spec, point.in_shape)
        return measured / ((before + self._pulse()) / 2)

    def _pulse(self) -> float:
        """Time the reference now; the first time several times, as a warm-up."""
        with using_threads(self.threads):
            if not self._reference:
                self._reference = median([self._timer(REFERENCE.spec, REFERENCE.in_shape) for _ in range(5)])
            self._last = self._timer(REFERENCE.spec, REFERENCE.in_shape)
        return self._last


def _in_proportion(curve: Curve, point: Point, share: float) -> dict[tuple[int, int], float]:
    """Return milliseconds at the nodes of a curve whose family has no sample, from one point on it.

    ``share`` are milliseconds per multiplication, whose number grows with the channels of both sides.
    """
    x, y = point.at
    each = share * max(1, point.spec.macs(point.in_shape)) / (x * y)
    return {(a, b): each * a * b for a in curve.xs for b in curve.ys}
