"""The blocks of a model that follow each other, each on what the one before it puts out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.errors import PlanError, TenfoldError
from tenfold.patterns import check_patterns, first_match
from tenfold.tracing.block_calls import repeated_blocks
from tenfold.tracing.contexts import evaluating, layer_by_layer
from tenfold.tracing.inputs import call_model, map_tensors, tensors_in

_WAY_OUT = "name the blocks that follow each other (blocks=), or compress the model in memory"


@dataclass(frozen=True)
class Chain:
    """Blocks that a forward calls once each, one after the other.

    Attributes:
        blocks: their paths, in the order in which they run.
        places: by block the one of its tensors that the block before put out, counted over all arguments.
        lengths: by block how many values it returns, the first of which the next one takes; 0 for a bare tensor.
    """

    blocks: tuple[str, ...]
    places: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def prefixes(self) -> tuple[str, ...]:
        """What the names within the blocks begin with."""
        return tuple(f"{path}." for path in self.blocks)

    def returned(self, number: int, hidden: Tensor) -> Any:
        """Return what a block returns, given what the next one takes."""
        length = self.lengths[number]
        return hidden if not length else (hidden, *[None] * (length - 1))

    def entering(self, number: int, args: Any, kwargs: Any) -> Tensor:
        """Return which of the arguments of a block is what the block before put out."""
        return list(tensors_in((args, kwargs)))[self.places[number]]


def find_chain(model: nn.Module, inputs: Any, blocks: Sequence[str] | None = None) -> Chain:
    """Return the chain of blocks of a model, as one forward shows: that with the most parameters where there are more.

    What one block returns has to be what the next one takes, the very tensor; so what is computed between two blocks
    breaks a chain.

    Args:
        model: on the meta device, where a forward costs nothing.
        inputs: there too.
        blocks: paths or patterns of modules that follow each other; rows of modules of one class if None.

    Raises:
        PlanError: there is no chain of two blocks, or it is not that of ``blocks``.
        UnknownNameError: a pattern that names nothing.
    """
    every = dict(model.named_modules())
    if blocks is None:
        wanted = repeated_blocks(model, inputs)
    else:
        check_patterns(blocks, [path for path in every if path])
        wanted = tuple(path for path in every if path and first_match(blocks, path) is not None)
    calls = _calls(model, inputs, wanted)
    chains: list[list[_Call]] = []
    for call in calls:
        if chains and call.place is not None and call.after is chains[-1][-1]:
            chains[-1].append(call)
        else:
            chains.append([call])
    chains = [chain for chain in chains if len(chain) > 1]
    if not chains or (blocks is not None and sum(map(len, chains)) != len(wanted)):
        alone = next((call.path for call in calls[1:] if call.place is None), None)
        why = f"what enters {alone!r} is not what the block before puts out" if alone else "no two blocks in a row"
        msg = f"{type(model).__name__} cannot be gone through block by block: {why}. Try this: {_WAY_OUT}"
        raise PlanError(msg)
    size = {path: sum(p.numel() for p in module.parameters()) for path, module in every.items()}
    best = max(chains, key=lambda chain: sum(size[call.path] for call in chain))
    first = best[1].place or 0
    places = (first, *(call.place or 0 for call in best[1:]))
    return Chain(tuple(call.path for call in best), places, tuple(call.length for call in best))


@dataclass(eq=False)
class _Call:
    path: str
    after: _Call | None  # whose output enters
    place: int | None
    length: int


def _calls(model: nn.Module, inputs: Any, wanted: Sequence[str]) -> list[_Call]:
    """Return how the blocks are called, in order."""
    made: dict[int, tuple[Tensor, _Call]] = {}  # tensors are held, or another one could get the same id
    calls: list[_Call] = []

    def enter(path: str) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            found = _Call(path, None, None, 0)
            for place, tensor in enumerate(tensors_in((args, kwargs))):
                if id(tensor) in made:
                    found.after, found.place = made[id(tensor)][1], place
                    break
            calls.append(found)

        return hook

    def leave(path: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            call = next(call for call in reversed(calls) if call.path == path)
            tensors = list(tensors_in(output))
            if len(tensors) != 1 or not (isinstance(output, Tensor) or output[0] is tensors[0]):
                return  # nothing that could be handed on alone
            call.length = 0 if isinstance(output, Tensor) else len(output)
            made[id(tensors[0])] = tensors[0], call

        return hook

    with ExitStack() as stack:
        for context in (evaluating(model), layer_by_layer()):
            stack.enter_context(context)
        for path in wanted:
            module = model.get_submodule(path)
            stack.enter_context(module.register_forward_pre_hook(enter(path), with_kwargs=True))
            stack.enter_context(module.register_forward_hook(leave(path)))
        try:
            call_model(model, map_tensors(inputs, lambda t: t.to("meta")))
        except TenfoldError as error:
            msg = f"the forward cannot be followed without weights: {error}. Try this: {_WAY_OUT}"
            raise PlanError(msg) from error
    paths = [call.path for call in calls]
    return [call for call in calls if paths.count(call.path) == 1]


def meta_inputs(inputs: Any) -> Any:
    """Return inputs of the same shapes without values."""
    return map_tensors(inputs, lambda t: torch.empty_like(t, device="meta"))
