"""Run two versions of a model alike, and say whether what comes out is the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.surgery.modules import find
from tenfold.tracing.contexts import evaluating, layer_by_layer
from tenfold.tracing.inputs import call_model, tensors_in
from tenfold.tracing.randomness import Randomness


def outputs_of(model: nn.Module, inputs: Any, watched: Iterable[str] = ()) -> list[Tensor]:
    """Return the floating point tensors that a model returns, in evaluation mode and with the same random numbers.

    Args:
        model: as it was afterwards.
        inputs: example inputs, as ``call_model`` takes them.
        watched: paths of modules whose outputs come first, at every call, in order.

    Raises:
        ProfileError: the forward fails.
    """
    seen: list[Tensor] = []

    def note(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.extend(t.detach().clone() for t in tensors_in(output) if t.is_floating_point())

    with ExitStack() as stack:
        for path in watched:
            stack.callback(find(model, path).register_forward_hook(note).remove)
        for context in (evaluating(model), layer_by_layer(), Randomness(model, inputs).seeded(0)):
            stack.enter_context(context)
        outputs = call_model(model, inputs)
    return seen + [t for t in tensors_in(outputs) if t.is_floating_point()]


def agree(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether outputs are equal to half of their digits."""
    return [t.shape for t in first] == [t.shape for t in second] and all(
        float((a - b).norm()) <= torch.finfo(a.dtype).eps ** 0.5 * float(b.norm()) + torch.finfo(a.dtype).tiny
        for a, b in zip(first, second, strict=True)
    )
