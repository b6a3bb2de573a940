"""Measured latency of a model, of several models in turns so that drift affects all alike, and of single layers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, comb, inf
from statistics import median, quantiles
from typing import Any

import torch
from torch import nn

from tenfold.errors import ProfileError
from tenfold.profiling.latency.load import NOTICED, Block, Clocks, Span, Watch
from tenfold.records import Clock, Latency, Speedup
from tenfold.tracing.contexts import device_of, dtype_of, evaluating, same_random_numbers, synchronize
from tenfold.tracing.inputs import arguments, batch_size_of, call_model, own_copy, tensors_in
from tenfold.tracing.layers import Entry
from tenfold.tracing.observing import Observation, observing

BLOCK_SECONDS = 0.010
MIN_ROUNDS, MAX_ROUNDS = 5, 500
WARMUP_SHARE = 0.15
LONGER = 2  # times as long as asked for is measured at most, while a speedup is in doubt
CACHES = 1.1  # interrupted runs take up to this much more processor time, and not all models the same: docs/latency.md
SURE = 1.5  # the upper bound of a speedup by the lower one: what is less certain is no factor


@dataclass(frozen=True)
class Comparison:
    """Latencies measured in turns, and the speedup of each model over the first one."""

    latencies: dict[str, Latency]
    speedups: dict[str, Speedup]


@dataclass(frozen=True)
class LayerTime:
    """Median and interquartile range of the milliseconds that one forward spends in a layer."""

    median_ms: float
    spread_ms: float


def measure_latency(
    model: nn.Module, inputs: Any, *, seconds: float = 2.0, threads: int | None = None, clocks: Clocks | None = None
) -> Latency:
    """Return the median milliseconds of one forward, with quartiles and the conditions of the measurement.

    Evaluation mode, no gradients, warm-up first; the device is synchronized before every reading of the clock. Short
    forwards are timed in blocks of at least 10 ms. Five blocks are measured even if they take longer than ``seconds``.
    What other processes took from a block is noticed as ``compare_latency`` does.

    Args:
        model: a module on the device and in the dtype to measure.
        inputs: example inputs; see ``call_model``.
        seconds: about how long to measure.
        threads: CPU threads; as many as torch uses now if None.
        clocks: tell the time; those of this machine if None.

    Raises:
        ProfileError: the forward fails.

    Example:
        >>> latency = measure_latency(nn.Linear(8, 8), torch.zeros(4, 8), seconds=0.05)
        >>> latency.batch_size, latency.low_ms <= latency.median_ms <= latency.high_ms
        (4, True)
    """
    return compare_latency({"model": (model, inputs)}, seconds=seconds, threads=threads, clocks=clocks).latencies[
        "model"
    ]


def compare_latency(
    variants: Mapping[str, tuple[nn.Module, Any]],
    *,
    seconds: float = 4.0,
    threads: int | None = None,
    clocks: Clocks | None = None,
) -> Comparison:
    """Return the latencies of several models measured in turns, and their speedups over the first.

    Use it whenever models are compared: times that are taken one after the other drift apart.

    In every round each model runs one block, in an order that is reversed from round to round, so that drift and other
    load on the machine affect all alike. A speedup is the median of the ratios within the rounds, with the
    distribution-free 95 % interval of a median.

    Beside the wall, the clocks of the processor are read. Rounds in which other processes took more than 2 % of a block
    are left out. Where fewer than five remain, what counts of models that run in one thread is the time that they had a
    processor, in an interval 10 % wider on both sides; of others, the interval holds all that the five least disturbed
    rounds allow. While it is too wide for a factor, it is measured up to twice as long; then ``doubt`` says why it is.

    Args:
        variants: name -> (model, example inputs); the others are compared with the first.
        seconds: about how long to measure, for all together.
        threads: CPU threads; as many as torch uses now if None.
        clocks: tell the time; those of this machine if None.

    Raises:
        ProfileError: nothing to measure, or a forward fails.

    Example:
        >>> x = torch.zeros(4, 8)
        >>> result = compare_latency({"wide": (nn.Linear(8, 512), x), "slim": (nn.Linear(8, 8), x)}, seconds=0.1)
        >>> list(result.latencies), result.speedups["wide"].ratio
        (['wide', 'slim'], 1.0)
    """
    if not variants:
        msg = "there is nothing to compare: pass at least one model with its inputs"
        raise ProfileError(msg)
    clocks = clocks or Clocks()
    with using_threads(threads):
        works = {name: _work(model, inputs, clocks) for name, (model, inputs) in variants.items()}
        return _Turns(works, variants, Watch(clocks, torch.get_num_threads())).compare(seconds)


def compare_blocks(
    blocks: Mapping[str, Callable[[int], float]],
    *,
    seconds: float,
    threads: int | None = None,
    clocks: Clocks | None = None,
) -> Comparison:
    """Return what blocks of runs take, measured in turns like models: see ``compare_latency``.

    The seconds are those that the blocks say, whoever counted them. What other processes took from a block decides no
    more than which rounds count, and whether a speedup is in doubt.

    Args:
        blocks: each runs something so many times and returns the seconds of one run.
        seconds: about how long to measure, for all together.
        threads: CPU threads; as many as torch uses now if None.
        clocks: tell the time; those of this machine if None.

    Example:
        >>> round(compare_blocks({"a": lambda n: 2e-3, "b": lambda n: 1e-3}, seconds=0.01).speedups["b"].ratio, 3)
        2.0
    """
    clocks = clocks or Clocks()
    with using_threads(threads):
        works = {name: _counted(block, clocks) for name, block in blocks.items()}
        nothing = dict.fromkeys(blocks, (nn.Identity(), torch.empty(0)))
        return _Turns(works, nothing, Watch(clocks, torch.get_num_threads()), counted=True).compare(seconds)


def layer_latency(
    model: nn.Module, inputs: Any, layers: Sequence[Entry], *, seconds: float = 2.0, threads: int | None = None
) -> dict[str, LayerTime]:
    """Return the time of each layer in one forward, by path, without layers that never run.

    Timed by hooks that synchronize the device on both sides. They keep torch from fusing transformer layers and cost
    time themselves, so the layers may add up to more or less than the total measured without them.
    """
    device = device_of(model, inputs)
    samples: list[dict[str, Observation]] = []

    def clock() -> float:
        synchronize(device)
        return time.perf_counter()

    with using_threads(threads), evaluating(model), same_random_numbers(device):
        deadline = time.perf_counter() + seconds
        while len(samples) <= MIN_ROUNDS or (time.perf_counter() < deadline and len(samples) <= MAX_ROUNDS):
            with observing(layers, clock) as seen:
                call_model(model, inputs)
            samples.append(seen)
    called = [path for path, observation in samples[0].items() if observation.calls]
    measured = samples[1:]  # the first forward was the warm-up
    return {path: _layer_time([1e3 * seen[path].amount for seen in measured]) for path in called}


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Return distribution-free confidence bounds on the median.

    The k-th smallest and k-th largest value, k as large as the binomial distribution allows at this confidence; with
    fewer than six values that is less than 95 %, and the bounds are the extremes.

    Example:
        >>> median_interval([1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
        (2, 9)
    """
    ordered = sorted(values)
    n = len(ordered)
    k, outside = 1, 2.0 * 0.5**n
    while k < (n + 1) // 2:
        outside += 2 * comb(n, k) * 0.5**n
        if outside > 1 - confidence:
            break
        k += 1
    return ordered[k - 1], ordered[n - k]


class _Turns:
    """Runs a block of each model in every round, and watches the machine between rounds.

    Args:
        works: run a model so many times and return the times of one run.
        variants: the models with their inputs.
        watch: of the machine.
        counted: whether the time on the wall of blocks is what somebody else counted.
    """

    def __init__(
        self,
        works: Mapping[str, Callable[[int], Block]],
        variants: Mapping[str, tuple[nn.Module, Any]],
        watch: Watch,
        *,
        counted: bool = False,
    ) -> None:
        self.works, self.variants, self.watch, self.counted = works, variants, watch, counted
        self.runs = dict.fromkeys(works, 1)
        self.blocks: dict[str, list[Block]] = {name: [] for name in works}

    def compare(self, seconds: float) -> Comparison:
        """Return what some seconds of measuring tell; of twice as many while a speedup is in doubt."""
        start = self.watch.clocks.wall()
        self.warm_up(WARMUP_SHARE * seconds)
        for times in range(1, LONGER + 1):
            self.measure(until=start + times * seconds)
            result = self.result()
            if not any(speedup.doubt for speedup in result.speedups.values()):
                break
        return result

    def warm_up(self, seconds: float) -> None:
        """Run every model for its part of some seconds, and find how many runs make a block long enough to time."""
        now = self.watch.clocks.wall
        for name, work in self.works.items():
            end, fastest = now() + seconds / len(self.works), inf
            while fastest == inf or now() < end:
                fastest = min(fastest, max(work(self.runs[name]).undisturbed, 1e-9))
                self.runs[name] = max(1, ceil(BLOCK_SECONDS / fastest))

    def measure(self, until: float) -> None:
        """Measure in turns until that time, but five rounds at least."""
        order = list(self.works)
        for done in range(len(self.watch.spins), MAX_ROUNDS):
            if done >= MIN_ROUNDS and self.watch.clocks.wall() > until:
                return
            self.watch.look()
            for name in order if done % 2 == 0 else reversed(order):
                self.blocks[name].append(self.works[name](self.runs[name]))

    def result(self) -> Comparison:
        """Return what has been measured until now."""
        every = [block for blocks in self.blocks.values() for block in blocks]
        devices = {device_of(*variant).type for variant in self.variants.values()}
        alone = devices == {"cpu"} and all(self.watch.alone(blocks) for blocks in self.blocks.values())
        alone = alone and not self.counted
        spans = [self.watch.spans(blocks, alone=alone) for blocks in self.blocks.values()]
        load = self.watch.in_words(every, [span for own in spans for span in own], alone=alone)
        rounds = list(zip(*spans, strict=True))
        kept, calm = _least_disturbed(rounds)
        clock: Clock = "processor" if alone and not calm else "wall"
        if clock == "processor":
            kept = [tuple(Span(span.least, span.least) for span in spans) for spans in rounds]
        elif self.counted:
            kept = [tuple(Span(span.most, span.most) for span in spans) for spans in kept]
        sure = SURE if calm or not self.counted else 0.0
        first, *_ = times = list(zip(*kept, strict=True))
        return Comparison(
            {n: _latency(own, *self.variants[n], clock, load) for n, own in zip(self.works, times, strict=True)},
            {n: _speedup(first, own, clock, load, sure) for n, own in zip(self.works, times, strict=True)},
        )


def _counted(block: Callable[[int], float], clocks: Clocks) -> Callable[[int], Block]:
    """Return a function that runs a block and returns what it counted, with its part of the other clocks."""

    def run(number: int) -> Block:
        counted: list[float] = []
        whole = clocks.block(lambda: counted.append(block(number)), 1)
        part = counted[0] / max(whole.wall, 1e-9)
        return Block(counted[0], part * whole.used, None if whole.waited is None else part * whole.waited)

    return run


def _work(model: nn.Module, inputs: Any, clocks: Clocks) -> Callable[[int], Block]:
    """Return a function that runs the model a number of times and returns the times of one run."""
    device = device_of(model, inputs)
    args, kwargs = arguments(own_copy(inputs))

    def block(number: int) -> Block:
        def work() -> None:
            for _ in range(number):
                model(*args, **kwargs)
            synchronize(device)

        with evaluating(model), same_random_numbers(device):
            model(*args, **kwargs)  # untimed: the block before may have left the caches to another model
            synchronize(device)
            return clocks.block(work, number)

    with evaluating(model), same_random_numbers(device):
        call_model(model, inputs)  # explains a failure, which the bare calls do not
    return block


def _latency(own: Sequence[Span], model: nn.Module, inputs: Any, clock: Clock, load: str) -> Latency:
    low, middle, high = _quartiles([1e3 * span.most for span in own])
    device = device_of(model, inputs)
    dtype = dtype_of(model, inputs)
    return Latency(
        median_ms=middle,
        low_ms=low,
        high_ms=high,
        runs=len(own),
        batch_size=batch_size_of(inputs),
        threads=getattr(model, "threads", None) or torch.get_num_threads(),
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        memory_format=_memory_format(inputs),
        runtime=getattr(model, "runtime", "torch"),
        tf32=device.type == "cuda" and dtype == torch.float32 and _tf32(),
        clock=clock,
        load=load,
    )


def _tf32() -> bool:
    """Whether products or convolutions in float32 may be rounded to TF32."""
    try:
        return torch.get_float32_matmul_precision() != "highest" or bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:  # torch refuses the old names once somebody has set the new ones
        backends: Any = torch.backends
        return "tf32" in (backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision)


def _memory_format(inputs: Any) -> str:
    formats = {4: ("channels_last", torch.channels_last), 5: ("channels_last_3d", torch.channels_last_3d)}
    for tensor in tensors_in(arguments(inputs)):
        name, layout = formats.get(tensor.dim(), ("", torch.contiguous_format))
        if name and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=layout):
            return name
    return "contiguous"


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _layer_time(values: list[float]) -> LayerTime:
    low, middle, high = _quartiles(values)
    return LayerTime(median_ms=middle, spread_ms=high - low)


def _speedup(reference: Sequence[Span], own: Sequence[Span], clock: Clock, load: str, sure: float) -> Speedup:
    if own is reference:
        return Speedup(ratio=1.0, low=1.0, high=1.0, rounds=len(own), clock=clock)
    wider = CACHES if clock == "processor" else 1.0
    low, _ = median_interval([a.least / b.most for a, b in zip(reference, own, strict=True)])
    _, high = median_interval([a.most / b.least for a, b in zip(reference, own, strict=True)])
    low, high = low / wider, high * wider
    return Speedup(
        ratio=median(a.most / b.most for a, b in zip(reference, own, strict=True)),
        low=low,
        high=high,
        rounds=len(own),
        clock=clock,
        doubt=(load or "the rounds differ too much") if high > sure * low else "",
    )


def _least_disturbed(rounds: list[tuple[Span, ...]]) -> tuple[list[tuple[Span, ...]], bool]:
    """Return the rounds of which others took next to nothing, and True; or the five least disturbed, and False."""
    rounds = sorted(rounds, key=lambda spans: max(span.disturbed for span in spans))
    calm = sum(max(span.disturbed for span in spans) <= NOTICED for spans in rounds)
    return rounds[: max(calm, MIN_ROUNDS)], calm >= MIN_ROUNDS


@contextmanager
def using_threads(number: int | None) -> Iterator[None]:
    """Let torch use this many CPU threads; as many as before if None."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
