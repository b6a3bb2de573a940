"""Measured latency of a model, of several models in turns so that drift affects all alike, and of single layers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, comb
from statistics import median, quantiles
from typing import Any

import torch
from torch import nn

from tenfold.errors import ProfileError
from tenfold.records import Latency, Speedup
from tenfold.tracing.contexts import device_of, dtype_of, evaluating, same_random_numbers, synchronize
from tenfold.tracing.inputs import arguments, batch_size_of, call_model, own_copy, tensors_in
from tenfold.tracing.layers import Entry
from tenfold.tracing.observing import Observation, observing

BLOCK_SECONDS = 0.010
MIN_ROUNDS, MAX_ROUNDS = 5, 500
WARMUP_SHARE = 0.15


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


def measure_latency(model: nn.Module, inputs: Any, *, seconds: float = 2.0, threads: int | None = None) -> Latency:
    """Return the median milliseconds of one forward, with quartiles and the conditions of the measurement.

    Evaluation mode, no gradients, warm-up first; the device is synchronized before every reading of the clock. Short
    forwards are timed in blocks of at least 10 ms. Five blocks are measured even if they take longer than ``seconds``.

    Args:
        model: a module on the device and in the dtype to measure.
        inputs: example inputs; see ``call_model``.
        seconds: about how long to measure.
        threads: CPU threads; as many as torch uses now if None.

    Raises:
        ProfileError: the forward fails.

    Example:
        >>> latency = measure_latency(nn.Linear(8, 8), torch.zeros(4, 8), seconds=0.05)
        >>> latency.batch_size, latency.low_ms <= latency.median_ms <= latency.high_ms
        (4, True)
    """
    return compare_latency({"model": (model, inputs)}, seconds=seconds, threads=threads).latencies["model"]


def compare_latency(
    variants: Mapping[str, tuple[nn.Module, Any]], *, seconds: float = 4.0, threads: int | None = None
) -> Comparison:
    """Return the latencies of several models measured in turns, and their speedups over the first.

    In every round each model runs one block, in an order that is reversed from round to round, so that drift and other
    load on the machine affect all alike. A speedup is the median of the ratios within the rounds, with the
    distribution-free 95 % interval of a median.

    Args:
        variants: name -> (model, example inputs); the others are compared with the first.
        seconds: about how long to measure, for all together.
        threads: CPU threads; as many as torch uses now if None.

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
    with using_threads(threads):
        blocks = {name: _block(model, inputs) for name, (model, inputs) in variants.items()}
        times = _in_turns(blocks, seconds)
        latencies = {name: _latency(times[name], *variants[name]) for name in variants}
    reference = times[next(iter(variants))]
    speedups = {name: _speedup(reference, own) for name, own in times.items()}
    return Comparison(latencies=latencies, speedups=speedups)


def compare_blocks(
    blocks: Mapping[str, Callable[[int], float]], *, seconds: float, threads: int | None = None
) -> Comparison:
    """Return what blocks of runs take, measured in turns like models: see ``compare_latency``.

    Args:
        blocks: each runs something so many times and returns the seconds of one run.
        seconds: about how long to measure, for all together.
        threads: CPU threads; as many as torch uses now if None.

    Example:
        >>> round(compare_blocks({"a": lambda n: 2e-3, "b": lambda n: 1e-3}, seconds=0.01).speedups["b"].ratio, 3)
        2.0
    """
    with using_threads(threads):
        times = _in_turns(blocks, seconds)
    nothing = nn.Identity()
    latencies = {name: _latency(own, nothing, torch.empty(0)) for name, own in times.items()}
    reference = times[next(iter(blocks))]
    return Comparison(latencies, {name: _speedup(reference, own) for name, own in times.items()})


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


def _block(model: nn.Module, inputs: Any) -> Callable[[int], float]:
    """Return a function that runs the model a number of times and returns the seconds per run."""
    device = device_of(model, inputs)
    args, kwargs = arguments(own_copy(inputs))

    def run(number: int) -> float:
        with evaluating(model), same_random_numbers(device):
            model(*args, **kwargs)  # untimed: the block before may have left the caches to another model
            synchronize(device)
            start = time.perf_counter()
            for _ in range(number):
                model(*args, **kwargs)
            synchronize(device)
            return (time.perf_counter() - start) / number

    with evaluating(model), same_random_numbers(device):
        call_model(model, inputs)  # explains a failure, which the bare calls do not
    return run


def _in_turns(blocks: Mapping[str, Callable[[int], float]], seconds: float) -> dict[str, list[float]]:
    """Return seconds per run by name, one number per round, measured in turns after a warm-up."""
    deadline = time.perf_counter() + seconds
    numbers = {name: _calibrate(block, WARMUP_SHARE * seconds / len(blocks)) for name, block in blocks.items()}
    times: dict[str, list[float]] = {name: [] for name in blocks}
    order = list(blocks)
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.perf_counter() > deadline:
            break
        for name in order:
            times[name].append(blocks[name](numbers[name]))
        order.reverse()
    return times


def _calibrate(block: Callable[[int], float], seconds: float) -> int:
    """Warm up, and return how many runs make a block long enough to time."""
    number, start = 1, time.perf_counter()
    while True:
        per_run = block(number)
        number = max(1, ceil(BLOCK_SECONDS / max(per_run, 1e-9)))
        if time.perf_counter() - start > seconds:
            return number


def _latency(times: list[float], model: nn.Module, inputs: Any) -> Latency:
    low, middle, high = _quartiles([1e3 * t for t in times])
    device = device_of(model, inputs)
    dtype = dtype_of(model, inputs)
    return Latency(
        median_ms=middle,
        low_ms=low,
        high_ms=high,
        runs=len(times),
        batch_size=batch_size_of(inputs),
        threads=getattr(model, "threads", None) or torch.get_num_threads(),
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        memory_format=_memory_format(inputs),
        runtime=getattr(model, "runtime", "torch"),
        tf32=device.type == "cuda" and dtype == torch.float32 and _tf32(),
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


def _speedup(reference: list[float], own: list[float]) -> Speedup:
    ratios = [a / b for a, b in zip(reference, own, strict=True)]
    low, high = median_interval(ratios)
    return Speedup(ratio=median(ratios), low=low, high=high, rounds=len(ratios))


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
