"""Profile of a model: one real forward under hooks and torch's flop counter."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import nn

from tenfold.layers import FactorizedLayer, stage_specs
from tenfold.profiling.counting import MacCounter
from tenfold.profiling.environment import environment
from tenfold.profiling.latency.measure import LayerTime, layer_latency, measure_latency
from tenfold.records import Call, LayerProfile, Profile, chain_macs
from tenfold.tracing.contexts import device_of, evaluating, layer_by_layer
from tenfold.tracing.inputs import call_model, input_shapes
from tenfold.tracing.layers import Entry, entries
from tenfold.tracing.observing import Observation, observing
from tenfold.tracing.randomness import Randomness
from tenfold.tracing.trace import Trace, Tracer

NEVER_CALLED = "never called by this forward (its weight may be read by its parent)"
NOT_REACHED = "never called by this forward: no input is routed to it"


def profile(
    model: nn.Module, example_inputs: Any, *, latency: bool = False, seconds: float = 2.0, threads: int | None = None
) -> Profile:
    """Measure the cost of a model on these inputs: parameters, bytes, MACs, calls and, on request, milliseconds.

    Use it first, to see where parameters, MACs and time are, and again on the result.

    The model runs once, in evaluation mode and without gradients, on its own device and in its own dtype; modes, hooks
    and random state are restored. All MACs are counted: those outside of layers (attention scores between functional
    calls) are in ``other_macs``. The MACs of a layer are what the flop counter finds while it runs; for layers with a
    geometry that is their closed form, and a note says if it is not.

    Args:
        model: any module whose forward runs.
        example_inputs: a tensor, tuple, list, mapping or ``(args, kwargs)``; see ``call_model``.
        latency: also measure the latency of the whole model and of every layer.
        seconds: approximate measuring time for the whole model, and again for the layers.
        threads: CPU threads during the measurement; as many as torch uses now if None.

    Raises:
        ProfileError: the forward fails, or a parameter has no size yet.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
        >>> cost = profile(model, torch.zeros(2, 3, 6, 6))
        >>> cost.params, cost.macs, cost.layer("0").macs
        (3114, 21312, 15552)
    """
    layers = entries(model)
    counter = MacCounter()
    with (
        evaluating(model),
        layer_by_layer(),
        Randomness(model, example_inputs).seeded(0),
        counter,
        Tracer(dict(model.named_modules())) as trace,
        observing(layers, lambda: counter.flops) as seen,
    ):
        call_model(model, example_inputs)
    times: dict[str, LayerTime] = {}
    total = None
    if latency:
        total = measure_latency(model, example_inputs, seconds=seconds, threads=threads)
        times = layer_latency(model, example_inputs, layers, seconds=seconds, threads=threads)
    profiles = tuple(
        _layer_profile(layer, seen[layer.path], times.get(layer.path), read=_is_read(layer, trace)) for layer in layers
    )
    return Profile(
        model=type(model).__name__,
        params=sum(layer.params for layer in profiles),
        bytes=sum(layer.bytes for layer in profiles),
        macs=counter.macs,
        input_shapes=input_shapes(example_inputs),
        layers=profiles,
        other_macs=counter.macs - sum(layer.macs for layer in profiles),
        fused_macs=counter.fused_macs,
        uncounted=counter.uncounted,
        latency=total,
        environment=environment(device_of(model, example_inputs)),
    )


def _is_read(layer: Entry, trace: Trace) -> bool:
    """Whether something else computes with the weight of a layer that could be factorized."""
    # All layers that share a weight compute with it: that is not a read by others.
    if layer.spec is None or layer.tied or isinstance(layer.module, FactorizedLayer):
        return False
    return layer.path in trace.read_outside


def _layer_profile(layer: Entry, seen: Observation, time: LayerTime | None, *, read: bool) -> LayerProfile:
    factorized = layer.module if isinstance(layer.module, FactorizedLayer) else None
    macs = int(seen.amount) // 2
    return LayerProfile(
        path=layer.path,
        aliases=layer.aliases,
        tied=layer.tied,
        read=read,
        kind=type(layer.module).__name__,
        spec=layer.spec,
        format=factorized.format if factorized else None,
        rank=dict(factorized.rank) if factorized else None,
        note="; ".join(_notes(layer, seen, macs, read=read)),
        params=layer.params,
        bytes=layer.bytes,
        macs=macs,
        calls=tuple(Call(in_shape=i, out_shape=o, count=n) for (i, o), n in seen.calls.items()),
        activation_bytes=seen.activation_bytes,
        latency_ms=time.median_ms if time else None,
        latency_spread_ms=time.spread_ms if time else None,
    )


def _notes(layer: Entry, seen: Observation, macs: int, *, read: bool) -> list[str]:
    notes = [layer.reason] if layer.reason else []
    if not any(prod(shape) for shape, _ in seen.calls):
        notes.append(NEVER_CALLED if read else NOT_REACHED)
    if layer.tied:
        notes.append(f"shares a parameter with {', '.join(layer.tied)}")
    if read:
        notes.append("others compute with its weight, for which factors would be multiplied out each time")
    if layer.spec is not None:
        stages = stage_specs(layer.module) if isinstance(layer.module, FactorizedLayer) else (layer.spec,)
        expected = sum(chain_macs(stages, shape) * count for (shape, _), count in seen.calls.items() if shape)
        if expected != macs:
            notes.append(f"the flop counter saw {macs} MACs where the geometry gives {expected}")
    return notes
