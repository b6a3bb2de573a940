"""Layers that run and are not used: whatever they put out, the outputs of the model are the same to the last bit."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.tracing.contexts import evaluating
from tenfold.tracing.inputs import call_model, map_tensors, tensors_in
from tenfold.tracing.randomness import Randomness


def unused_layers(model: nn.Module, paths: Collection[str], batches: Sequence[Any]) -> set[str]:
    """Return those of some layers on which no output of the model depends, on the first batch that reaches them.

    Noise is added to what a layer puts out. Where gradients say nothing, as under ``no_grad``, that tells a layer that
    the outputs go through from one that is computed and thrown away. All at once are tried first.

    Args:
        model: that the layers are in.
        paths: of layers that the batches reach.
        batches: as the model takes them.
    """
    waiting, found = set(paths), set[str]()
    for batch in batches:
        if not waiting:
            break
        wanted, reached = _outputs(model, batch, waiting, noise=False)
        if reached and _equal(_outputs(model, batch, reached)[0], wanted):
            found |= reached
        elif len(reached) > 1:
            found |= {path for path in reached if _equal(_outputs(model, batch, {path})[0], wanted)}
        waiting -= reached
    return found


def _outputs(
    model: nn.Module, batch: Any, paths: Collection[str], *, noise: bool = True
) -> tuple[list[Tensor], set[str]]:
    """Return the outputs of a model with noise in those of some layers, and which of these ran."""
    reached = set[str]()
    drawn = torch.Generator().manual_seed(0)

    def noisy(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or not tensor.numel():
            return tensor
        scale = tensor.abs().amax() + 1
        return tensor + scale * torch.rand(tensor.shape, generator=drawn).to(tensor)

    with ExitStack() as stack:
        for path in paths:

            def leave(_module: nn.Module, _args: Any, output: Any, path: str = path) -> Any:
                reached.add(path)
                return map_tensors(output, noisy) if noise else None

            stack.enter_context(model.get_submodule(path).register_forward_hook(leave))
        stack.enter_context(evaluating(model))
        stack.enter_context(Randomness(model, batch).seeded(0))
        return list(tensors_in(call_model(model, batch))), reached


def _equal(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))
