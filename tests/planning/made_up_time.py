"""A made-up clock: every layer takes what its multiplications take, and every model what its layers do, and more."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from tenfold.layers import spec_of
from tenfold.profiling import Comparison, LatencyTable
from tenfold.records import Latency, Speedup

OVERHEAD_MS = 0.3  # of everything that is no layer


def stage_ms(spec, in_shape):
    return 0.01 + spec.macs(in_shape) / 1e6


def model_ms(model, inputs):
    """Return the time of a model whose every layer takes ``stage_ms`` and whose rest takes ``OVERHEAD_MS``."""
    total = OVERHEAD_MS

    def add(module, args, _output):
        nonlocal total
        spec, _ = spec_of(module)
        total += stage_ms(spec, tuple(args[0].shape)) if spec is not None else 0

    hooks = [m.register_forward_hook(add) for m in model.modules() if type(m) in (nn.Conv2d, nn.Linear)]
    with torch.no_grad():
        model(inputs)
    for hook in hooks:
        hook.remove()
    return total


@dataclass
class FakeCompare:
    """Stands in for ``compare_latency``: every model takes ``model_ms``, times ``bias`` when it is factorized."""

    bias: float = 1.0
    channels_last: float = 1.0  # factor on models in that memory format
    asked: int = 0

    def __call__(self, variants, *, seconds, threads):
        self.asked += 1
        times = {}
        for name, (model, inputs) in variants.items():
            ms = model_ms(model, inputs) - (OVERHEAD_MS if name in ("dense", "factorized") else 0.0)
            last = inputs.dim() == 4 and inputs.is_contiguous(memory_format=torch.channels_last)
            times[name] = (
                (self.channels_last if last else 1.0)
                * ms
                * (self.bias if name.startswith(("after", "factorized")) else 1.0)
            )
        latencies = {
            n: Latency(median_ms=t, low_ms=t, high_ms=t, runs=9, threads=1, device="cpu", dtype="float32")
            for n, t in times.items()
        }
        first = next(iter(times.values()))
        speedups = {
            n: Speedup(ratio=first / t, low=0.99 * first / t, high=1.01 * first / t, rounds=9) for n, t in times.items()
        }
        return Comparison(latencies, speedups)


def clock():
    return LatencyTable(cache=None, threads=1, timer=stage_ms, model_timer=model_ms)


def three_layers():
    """Return two convolutions of one geometry and a linear layer."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(32 * 64, 64)).eval()
