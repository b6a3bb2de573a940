"""Latencies by the clock of the processor: what a machine that does other things too can still tell."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median, quantiles
from typing import Any

import torch
from torch import nn

from tenfold.profiling import Comparison, compare_latency
from tenfold.profiling.latency.measure import median_interval
from tenfold.records import Latency, Speedup
from tenfold.tracing.inputs import arguments, batch_size_of

BLOCK = 0.02  # seconds of a block: long against the resolution of the clock


def compare(variants: Mapping[str, tuple[nn.Module, Any]], seconds: float, clock: str) -> Comparison:
    """Return what ``tenfold.compare_latency`` does, by the clock on the wall or by that of the processor.

    The latter counts the time of all threads of this process and nothing else. On a busy machine the wall favours
    whatever is short enough to run between two interruptions; with several threads only the wall tells latency.
    """
    if clock == "wall":
        return compare_latency(variants, seconds=seconds)
    blocks = {name: _block(*variant) for name, variant in variants.items()}
    numbers = {name: max(1, round(BLOCK / max(block(3), 1e-9))) for name, block in blocks.items()}
    times: dict[str, list[float]] = {name: [] for name in blocks}
    start, order = time.process_time(), list(blocks)
    while len(times[order[0]]) < 7 or time.process_time() - start < seconds:
        for name in order:
            times[name].append(blocks[name](numbers[name]))
        order.reverse()
    first = times[next(iter(variants))]
    return Comparison(
        latencies={name: _latency(own, variants[name][1]) for name, own in times.items()},
        speedups={name: _speedup(first, own) for name, own in times.items()},
    )


def _block(model: nn.Module, inputs: Any) -> Callable[[int], float]:
    args, kwargs = arguments(inputs)

    def run(number: int) -> float:
        with torch.no_grad():
            model(*args, **kwargs)  # untimed: the block before may have left the caches to another model
            start = time.process_time()
            for _ in range(number):
                model(*args, **kwargs)
        return (time.process_time() - start) / number

    return run


def _latency(times: list[float], inputs: Any) -> Latency:
    low, middle, high = quantiles([1e3 * t for t in times], n=4, method="inclusive")
    return Latency(
        median_ms=middle,
        low_ms=low,
        high_ms=high,
        runs=len(times),
        batch_size=batch_size_of(inputs),
        threads=torch.get_num_threads(),
        device="cpu",
        dtype="float32",
        memory_format="contiguous",
        tf32=False,
    )


def _speedup(reference: list[float], own: list[float]) -> Speedup:
    ratios = [a / b for a, b in zip(reference, own, strict=True)]
    low, high = median_interval(ratios)
    return Speedup(ratio=median(ratios), low=low, high=high, rounds=len(ratios))
