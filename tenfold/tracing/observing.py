"""Per-layer statistics of real forwards, by hooks: calls with their shapes, and a share of MACs or time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tenfold.records import Shape
from tenfold.tracing.inputs import shape_of, tensors_in
from tenfold.tracing.layers import Entry


@dataclass
class Observation:
    """Calls of one layer so far. ``amount`` is its share of the gauge, without that of the layers inside it."""

    calls: Counter[tuple[Shape, Shape]] = field(default_factory=Counter)
    activation_bytes: int = 0
    amount: float = 0


@contextmanager
def observing(layers: Sequence[Entry], gauge: Callable[[], float]) -> Iterator[dict[str, Observation]]:
    """Observe layers while the context is open, by path.

    Args:
        layers: the layers to observe.
        gauge: a counter that only grows, of MACs or seconds; it is read whenever a layer starts or ends.
    """
    seen = {layer.path: Observation() for layer in layers}
    open_calls: list[list[float]] = []  # per running layer: the gauge at its start, and the share of inner layers

    def enter(_module: nn.Module, _args: Any) -> None:
        open_calls.append([gauge(), 0])

    def leave_from(observation: Observation) -> Callable[..., None]:
        def leave(_module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            start, inner = open_calls.pop()
            spent = gauge() - start
            observation.amount += spent - inner
            if open_calls:
                open_calls[-1][1] += spent
            _note(observation, (args, kwargs), output)

        return leave

    with ExitStack() as stack:
        for layer in layers:
            if isinstance(layer.module, torch.jit.ScriptModule):
                continue  # takes no hooks; its share counts for its caller
            stack.enter_context(layer.module.register_forward_pre_hook(enter, prepend=True))
            stack.enter_context(layer.module.register_forward_hook(leave_from(seen[layer.path]), with_kwargs=True))
        yield seen


def _note(observation: Observation, inputs: Any, output: Any) -> None:
    first_in, first_out = next(tensors_in(inputs), None), next(tensors_in(output), None)
    shapes = tuple(() if t is None else shape_of(t) for t in (first_in, first_out))
    observation.calls[shapes[0], shapes[1]] += 1
    observation.activation_bytes += sum(t.numel() * t.element_size() for t in tensors_in(output))
