"""A network in parts: what comes before its blocks, each block, and what comes after them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.errors import DataError
from tenfold.streaming.activations import Activations, ByBatch
from tenfold.streaming.chain import Chain
from tenfold.tensors import digest
from tenfold.tracing.block_calls import without_cache
from tenfold.tracing.contexts import evaluating, layer_by_layer
from tenfold.tracing.inputs import arguments, call_model, map_tensors
from tenfold.tracing.replay import stand_in

OUTER = "outer"  # the attribute of the parts below, before the paths of their layers


class _ReachedError(BaseException):
    """Raised where the forward has come to its last block; no error, so that nothing on the way catches it."""


@dataclass(frozen=True)
class _Hidden:
    """Stands in the arguments of a block for what the block before puts out."""


HIDDEN = _Hidden()


class Lead(nn.Module):
    """A network up to its first block, whose input it returns. The blocks themselves do not run."""

    def __init__(self, outer: nn.Module, chain: Chain) -> None:
        super().__init__()
        self.outer, self.chain = outer, chain

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return what enters the first block for inputs of the network."""
        found: list[Tensor] = []

        def enter(number: int, given: Any, named: Any) -> Any:
            found.append(self.chain.entering(number, given, named))
            raise _ReachedError

        with _standing_in(self.outer, self.chain, enter), without_cache(self.outer):
            try:
                self.outer(*args, **kwargs)
            except _ReachedError:
                return found[0]
        msg = "the forward did not come to the first block"
        raise DataError(msg)


class Tail(nn.Module):
    """A network after its last block, whose output it takes, and beside it the inputs of the network."""

    def __init__(self, outer: nn.Module, chain: Chain) -> None:
        super().__init__()
        self.outer, self.chain = outer, chain

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs of the network, given what its last block puts out."""

        def enter(number: int, given: Any, named: Any) -> Any:
            own = hidden if number == 0 else self.chain.entering(number, given, named)
            return self.chain.returned(number, own)

        with _standing_in(self.outer, self.chain, enter), without_cache(self.outer):
            return self.outer(*args, **kwargs)


@contextmanager
def _standing_in(outer: nn.Module, chain: Chain, enter: Callable[[int, Any, Any], Any]) -> Iterator[None]:
    """Let something else run in place of each block, called with its number and its arguments."""

    def instead(number: int) -> Callable[..., Any]:
        return lambda *args, **kwargs: enter(number, args, kwargs)

    with ExitStack() as stack:
        for number, path in enumerate(chain.blocks):
            stack.enter_context(stand_in(outer.get_submodule(path), instead(number)))
        yield


@dataclass(eq=False)
class BlockInputs:
    """What each block is called with besides the output of the one before: masks, positions; equal ones are held once.

    Attributes:
        calls: by batch and block the arguments, with ``HIDDEN`` in its place.
    """

    calls: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = field(default_factory=dict)
    _known: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls, outer: nn.Module, chain: Chain, batches: Mapping[int, Any], entered: Callable[[Tensor], None]
    ) -> BlockInputs:
        """Run what comes before the blocks on each batch.

        Args:
            outer: the network, with the weights that lie outside of its blocks.
            chain: of its blocks.
            batches: inputs of the network, by number.
            entered: called with what enters the first block, batch by batch.
        """
        found = cls()
        with evaluating(outer), layer_by_layer(), without_cache(outer):
            for place, batch in batches.items():
                seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

                def enter(number: int, args: Any, kwargs: Any, seen: Any = seen) -> Any:
                    hidden = chain.entering(number, args, kwargs)
                    seen.append(found._kept(args, kwargs, hidden))
                    if number == 0:
                        entered(hidden.detach())
                    if number + 1 == len(chain.blocks):
                        raise _ReachedError
                    return chain.returned(number, hidden)

                with _standing_in(outer, chain, enter):
                    try:
                        call_model(outer, batch)
                    except _ReachedError:
                        found.calls[place] = seen
        return found

    def call(self, batch: int, block: int, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a block on a batch."""
        args, kwargs = self.calls[batch][block]
        return (
            tuple(hidden if value is HIDDEN else value for value in args),
            {name: hidden if value is HIDDEN else value for name, value in kwargs.items()},
        )

    @property
    def bytes(self) -> int:
        """What it holds."""
        return sum(tensor.nbytes for tensor in self._known.values())

    def _kept(self, args: Any, kwargs: Any, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def own(value: Any) -> Any:
            return HIDDEN if value is hidden else map_tensors(value, self._once)

        return tuple(own(value) for value in args), {name: own(value) for name, value in kwargs.items()}

    def _once(self, tensor: Tensor) -> Tensor:
        name = digest({"": tensor.detach()})
        return self._known.setdefault(name, tensor.detach().clone())


class StoredCalls(Sequence[Any]):
    """Batches of a part of the network, made when they are asked for from what lies on the disk.

    Args:
        numbers: of the batches of the network, in order.
        call: makes the inputs of the part for one of them.
    """

    def __init__(self, numbers: Sequence[int], call: Callable[[int], Any]) -> None:
        self._numbers, self._call = numbers, call

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return StoredCalls(self._numbers[place], self._call)
        return self._call(self._numbers[place])


def block_calls(known: BlockInputs, block: int, stored: Activations | ByBatch, numbers: Sequence[int]) -> StoredCalls:
    """Return the batches of a block, of which the hidden states are stored."""
    return StoredCalls(numbers, lambda number: known.call(number, block, stored.read(number)))


def tail_calls(batches: Sequence[Any], stored: Activations | ByBatch, numbers: Sequence[int]) -> StoredCalls:
    """Return the batches of ``Tail``."""

    def call(number: int) -> Any:
        args, kwargs = arguments(batches[number])
        return (stored.read(number), *args), kwargs

    return StoredCalls(numbers, call)


def run_block(block: nn.Module, batch: Any) -> Tensor:
    """Return what a block hands on to the next."""
    with torch.no_grad():
        output = call_model(block, batch)
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found
