"""The blocks of a model that follow each other, each on what the one before it puts out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.errors import PlanError, ProfileError
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
        blocks: paths or patterns of modules that follow each other, of which the outermost count; rows of modules of
            one class if None.

    Raises:
        PlanError: there is no chain of two blocks, or it is not that of ``blocks``.
        UnknownNameError: a pattern that names nothing.
    """
    every = dict(model.named_modules())
    try:
        if blocks is None:
            wanted = repeated_blocks(model, inputs)
        else:
            check_patterns(blocks, [path for path in every if path])
            wanted = _outermost(path for path in every if path and first_match(blocks, path) is not None)
        calls = _calls(model, inputs, wanted)
    except ProfileError as error:
        msg = f"the forward asks for values that a model without weights does not have: {error}. Compress it in memory"
        raise PlanError(msg) from error
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


def _outermost(paths: Iterable[str]) -> tuple[str, ...]:
    """Return those of some paths, parents before children, that lie in no other."""
    found: list[str] = []
    for path in paths:
        if not path.startswith(tuple(f"{outer}." for outer in found)):
            found.append(path)
    return tuple(found)


@dataclass(eq=False)
class _Call:
    path: str
    after: _Call | None  # whose output enters
    place: int | None
    length: int


@dataclass(eq=False)
class _Seen:
    """The calls of blocks in one forward, and which tensors these made."""

    calls: list[_Call] = field(default_factory=list)
    made: dict[int, tuple[Tensor, _Call]] = field(default_factory=dict)  # held, or another could get the same id

    def entering(self, path: str) -> Any:
        """Return a hook that notes what enters a block."""

        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            found = _Call(path, None, None, 0)
            for place, tensor in enumerate(tensors_in((args, kwargs))):
                if id(tensor) in self.made:
                    found.after, found.place = self.made[id(tensor)][1], place
                    break
            self.calls.append(found)

        return hook

    def leaving(self, path: str) -> Any:
        """Return a hook that notes what a block puts out."""

        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            call = next(call for call in reversed(self.calls) if call.path == path)
            tensors = list(tensors_in(output))
            if len(tensors) != 1 or not (isinstance(output, Tensor) or output[0] is tensors[0]):
                return  # nothing that could be handed on alone
            call.length = 0 if isinstance(output, Tensor) else len(output)
            self.made[id(tensors[0])] = tensors[0], call

        return hook


def _calls(model: nn.Module, inputs: Any, wanted: Sequence[str]) -> list[_Call]:
    """Return how the blocks are called, in order."""
    seen = _Seen()
    with ExitStack() as stack:
        for context in (evaluating(model), layer_by_layer()):
            stack.enter_context(context)
        for path in wanted:
            module = model.get_submodule(path)
            stack.enter_context(module.register_forward_pre_hook(seen.entering(path), with_kwargs=True))
            stack.enter_context(module.register_forward_hook(seen.leaving(path)))
        call_model(model, inputs)
    paths = [call.path for call in seen.calls]
    return [call for call in seen.calls if paths.count(call.path) == 1]


def meta_inputs(inputs: Any) -> Any:
    """Return inputs of the same shapes without values, and without masks, of which a forward would ask the values."""
    if isinstance(inputs, Mapping):
        inputs = {name: value for name, value in inputs.items() if not str(name).endswith("mask")}
    return map_tensors(inputs, lambda t: torch.empty_like(t, device="meta"))
