"""The clock: milliseconds of layers on the target, dense and at every rank, from a table of timed stages."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
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
from tenfold.profiling.latency.grid import LEVELS, Chart, Curve, Point, chart, stage_columns
from tenfold.profiling.latency.layer_timer import StageTimer, Timer
from tenfold.profiling.latency.measure import layer_latency, using_threads
from tenfold.profiling.latency.monotone import MonotoneFit
from tenfold.records import Call, LayerSpec, Shape
from tenfold.tracing.layers import Entry, entries

CACHE = "~/.cache/tenfold/latency"
# What every measurement is paired with: a convolution as networks have it, half a millisecond on one CPU core.
REFERENCE = Point(
    LayerSpec(kind="conv", in_channels=64, out_channels=64, kernel=(3, 3), padding=(1, 1)), (1, 64, 28, 28)
)

_MOST_CORRECTION = 2.0

Array = NDArray[np.float64]
Place = tuple[str, LayerSpec, Shape]  # a format for a layer on an input shape
Progress = Callable[[int, int], None]
_LOG = logging.getLogger("tenfold")


class Timed(Protocol):
    """What the clock wants to know of a layer; rank problems have it."""

    @property
    def spec(self) -> LayerSpec:
        """Geometry of the dense layer."""

    @property
    def formats(self) -> tuple[str, ...]:
        """Names of the formats that it may get."""

    @property
    def calls(self) -> tuple[Call, ...]:
        """Its inputs in one forward."""


class Used(Protocol):
    """A layer of a profile: its geometry, if it has one, and its inputs in one forward."""

    @property
    def spec(self) -> LayerSpec | None:
        """Geometry of the dense layer."""

    @property
    def calls(self) -> tuple[Call, ...]:
        """Its inputs in one forward."""


class Clock:
    """Milliseconds of layer geometries on one device, in one dtype and memory format, with so many threads.

    A factorized layer takes as long as its stages one after the other, and each stage is a plain layer that many
    layers share: the table holds stages. Ranks in between are interpolated so that time never falls with a rank.

    Every sample is divided by a reference convolution timed right before and after it, so that a clock that drifts or a
    machine that gets busy cancels out; milliseconds are in units of that reference as it was when this object first
    measured. Tables are kept on disk, by device, versions, dtype, threads and memory format.

    Args:
        device: where the model is to run.
        dtype: of weights and activations.
        threads: CPU threads; as many as torch uses now if None.
        memory_format: ``contiguous``, ``channels_last`` or ``channels_last_3d``.
        cache: the folder for the tables; None keeps them in memory.
        seconds: upper bound on the time to measure, over the life of the object; dense layers are timed once in any
            case.
        repeats: how many samples a point gets if there is time.
        step: channels come in multiples of this on the device.
        timer: returns milliseconds of a stage; the real one if None.
        model_timer: returns milliseconds of a model on inputs; the real one if None.
        progress: called with (samples taken, samples wanted).

    Example:
        >>> clock = Clock(cache=None, timer=lambda spec, in_shape: 1.0 + spec.macs(in_shape) / 1000)
        >>> layer = LayerSpec(kind="linear", in_channels=64, out_channels=64)
        >>> calls = (Call(in_shape=(1, 64)),)
        >>> clock.predict("low_rank", layer, calls, [{"rank": 8}, {"rank": 16}]).round(2).tolist()
        [3.02, 4.05]
    """

    def __init__(  # noqa: PLR0913 - the conditions of a measurement are many
        self,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        threads: int | None = None,
        memory_format: str = "contiguous",
        cache: Path | str | None = CACHE,
        seconds: float = 60.0,
        repeats: int = 3,
        step: int = 8,
        timer: Timer | None = None,
        model_timer: Callable[[nn.Module, Any], float] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.device, self.dtype, self.memory_format = torch.device(device), dtype, memory_format
        self.threads = torch.get_num_threads() if threads is None else threads
        self.seconds, self.repeats, self.step = seconds, repeats, step
        self._timer = StageTimer(self.device, dtype, memory_format) if timer is None else timer
        self._model_timer = model_timer
        self._progress = progress
        self._folder = cache
        self._cache = LatencyCache(cache, self.conditions)
        self._samples = self._cache.load()
        self._unsaved: set[str] = set()
        self._spent = 0.0
        self._reference = 0.0  # its milliseconds when first measured
        self._last = 0.0  # and a moment ago
        self._charts: dict[Place, Chart] = {}
        self._prepared: set[Place] = set()
        self._fits: dict[Curve, MonotoneFit] = {}
        self._known: dict[Point, None] = {}
        self._chains: dict[Place, list[float]] = {}

    @property
    def conditions(self) -> dict[str, Any]:
        """All that the times depend on but the shapes."""
        return {
            "device": self.device.type,
            "name": device_name(self.device),
            "torch": str(torch.__version__),
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": self.threads,
            "memory_format": self.memory_format,
        }

    def in_format(self, memory_format: str) -> Clock:
        """Return a clock with the same settings for another memory format."""
        fake = not isinstance(self._timer, StageTimer)
        return Clock(
            device=self.device,
            dtype=self.dtype,
            threads=self.threads,
            memory_format=memory_format,
            cache=self._folder,
            seconds=self.seconds,
            repeats=self.repeats,
            step=self.step,
            timer=self._timer if fake else None,
            model_timer=self._model_timer,
            progress=self._progress,
        )

    def layer_ms(self, spec: LayerSpec, calls: Sequence[Call]) -> float:
        """Return the milliseconds that the dense layer takes in one forward, all its calls together."""
        points = [Point.of(spec, call.in_shape) for call in calls]
        self._measure([p for p in points if p.key not in self._samples], 1, bounded=False)
        return sum(self._ms(p) * call.count for p, call in zip(points, calls, strict=True))

    def predict(self, format: str, spec: LayerSpec, calls: Sequence[Call], ranks: Sequence[Rank]) -> Array:
        """Return the milliseconds that the layer would take in one forward in this format, one for each rank.

        What was not prepared is measured now, coarsely.
        """
        total = np.zeros(len(ranks))
        for call in calls:
            total += call.count * self._predict(format, spec, call.in_shape, ranks)
        return total

    def prepare(self, problems: Sequence[Timed]) -> None:
        """Measure all that these layers need: all of them coarsely first, then finer and again while there is time."""
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
            points = list(dict.fromkeys(p for place in places for p in self._chart(place).levels[level]))
            if not self._measure([*dense, *points], 1 if level == 0 else self.repeats):
                break
        self.save()

    def learn(self, format: str, spec: LayerSpec, in_shape: Shape, rank: Rank, measured: float) -> None:
        """Note that the whole layer took ``measured`` times what the dense one takes, to correct predictions by.

        What the stages one by one do not show, such as changes of the memory layout between them, is taken as a factor
        that all ranks of the geometry share: the geometric mean of all that was noted. Geometries and formats of which
        nothing was noted take the mean of the others.
        """
        place = (format, spec, in_shape)
        predicted = self._sum_of_stages(place, [rank])[0]
        wanted = measured * self._ms(Point.of(spec, in_shape))
        factor = min(_MOST_CORRECTION, max(1 / _MOST_CORRECTION, wanted / predicted))
        self._chains.setdefault(place, []).append(log(factor))

    def share_of_layers(self, model: nn.Module, inputs: Any, layers: Sequence[Used], *, seconds: float = 2.0) -> float:
        """Return the part of a forward, in (0, 1], that is spent in layers with a geometry.

        From within single forwards, so that a busy machine, caches and all that differs from layers timed alone hits
        both sides of the ratio.
        """
        if self._model_timer is not None:
            alone = sum(self.layer_ms(layer.spec, layer.calls) for layer in layers if layer.spec is not None)
            return min(1.0, alone / self._model_timer(model, inputs))
        found = [entry for entry in entries(model) if entry.spec is not None and entry.path]
        if not found:
            return 1.0
        whole = Entry(path="", aliases=(), tied=(), module=model, spec=None, reason="", params=0, bytes=0)
        times = layer_latency(model, inputs, [whole, *found], seconds=seconds, threads=self.threads)
        rest = times.pop("").median_ms
        inside = sum(time.median_ms for time in times.values())
        return max(inside / (inside + rest), 1e-3)

    def save(self) -> None:
        """Write what was measured to the cache."""
        if self._unsaved:
            self._cache.save({key: self._samples[key] for key in self._unsaved})
            self._unsaved.clear()

    def _predict(self, format: str, spec: LayerSpec, in_shape: Shape, ranks: Sequence[Rank]) -> Array:
        place = (format, spec, in_shape)
        return self._sum_of_stages(place, ranks) * exp(self._chain(place))

    def _chain(self, place: tuple[str, LayerSpec, Shape]) -> float:
        """Return the logarithm of what a chain of stages takes over their sum: as noted here, or elsewhere on average.

        Without the average, plans would flee from what was measured to what is not known to be as slow.
        """
        own = self._chains.get(place)
        logs = own or [sum(noted) / len(noted) for noted in self._chains.values()]
        return sum(logs) / len(logs) if logs else 0.0

    def _sum_of_stages(self, place: Place, ranks: Sequence[Rank]) -> Array:
        format, spec, in_shape = place
        found = self._chart(place)
        if place not in self._prepared:
            self._prepared.add(place)
            self._measure([Point.of(spec, in_shape)], 1, bounded=False)
            self._measure(found.levels[0], 1)
        total = np.zeros(len(ranks))
        for point, rows, x, y in stage_columns(format, spec, in_shape, ranks):
            curve = found.curve(point)
            if curve is None:  # no sampled rank led there: it costs more than the dense layer
                self._known.setdefault(point)  # its family may have no other: slices and groups are numbers of a rank
                curve = Curve(point.family, tuple(np.unique(x).tolist()), tuple(np.unique(y).tolist()))
            np.add.at(total, rows, self._fit(curve, point, Point.of(spec, in_shape))(x, y))
        return total

    def _chart(self, place: Place) -> Chart:
        if place not in self._charts:
            self._charts[place] = chart(*place, step=self.step)
            self._known |= dict.fromkeys(p for level in self._charts[place].levels for p in level)
        return self._charts[place]

    def _fit(self, curve: Curve, point: Point, dense: Point) -> MonotoneFit:
        if curve not in self._fits:
            family = [p for p in self._known if p.family == curve.family]
            near = [p for p in family if p.key in self._samples]
            points = {p.at: self._ms(p) for p in near if curve.holds(*p.at)} or {p.at: self._ms(p) for p in near}
            if len(points) < 2:
                _LOG.warning("there was no time for %s: taken in proportion to the dense layer", curve.family)
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
        """Take samples in turns until every point has so many; return whether the time was enough."""
        self._known |= dict.fromkeys(points)
        missing = {p: repeats - len(self._samples.get(p.key, ())) for p in points}
        queue = [p for turn in range(repeats) for p in points if missing[p] > turn]
        with using_threads(self.threads):
            for done, point in enumerate(queue):
                if bounded and self._spent >= self.seconds:
                    return False
                start = time.perf_counter()
                self._samples.setdefault(point.key, []).append(self._sample(point))
                self._unsaved.add(point.key)
                self._spent += time.perf_counter() - start
                if self._progress is not None:
                    self._progress(done + 1, len(queue))
        if queue:
            self._fits.clear()
        return True

    def _sample(self, point: Point) -> float:
        """Return the time of a stage in units of the reference."""
        before = self._last or self._pulse()
        measured = self._timer(point.spec, point.in_shape)
        return measured / ((before + self._pulse()) / 2)

    def _pulse(self) -> float:
        """Return the milliseconds of the reference now; the first time, with a warm-up and from several."""
        with using_threads(self.threads):
            if not self._reference:
                self._reference = median([self._timer(REFERENCE.spec, REFERENCE.in_shape) for _ in range(5)])
            self._last = self._timer(REFERENCE.spec, REFERENCE.in_shape)
        return self._last


def _in_proportion(curve: Curve, point: Point, share: float) -> dict[tuple[int, int], float]:
    """Return milliseconds at the nodes of a curve of whose family no point was sampled, from one point on it.

    ``share`` are milliseconds per multiplication, whose number grows with the channels of both sides.
    """
    x, y = point.at
    each = share * max(1, point.spec.macs(point.in_shape)) / (x * y)
    return {(a, b): each * a * b for a in curve.xs for b in curve.ys}
