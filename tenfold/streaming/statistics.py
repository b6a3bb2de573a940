"""The first pass over a network: what each layer could become, block by block, forward and then back.

Forward, what enters each block is written to the disk. Back, from the last block to the first, each block runs once
more, with the gradient at its output that the blocks behind it sent back: its statistics become rows of the option
table, and go. What is in memory is one block, whatever the depth of the network or the number of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.calibration import calibrate_part
from tenfold.calibration.calibrate import Feed
from tenfold.calibration.gradients import GradientSums
from tenfold.decompositions import Moments, Sketch
from tenfold.decompositions.covariance import Covariance
from tenfold.errors import DataError
from tenfold.files import atomic_write
from tenfold.planning import tabulate
from tenfold.planning.eligible import changeable
from tenfold.planning.unit_kinds import kinds_of, wants_units
from tenfold.records import OptionTable
from tenfold.runtime import Runtime
from tenfold.streaming.activations import Activations
from tenfold.streaming.network import Network
from tenfold.streaming.network_parts import BlockInputs, Lead, StoredCalls, Tail, block_calls, run_block, tail_calls
from tenfold.streaming.part_tables import LEAD, TAIL, inside, recipe_of_part
from tenfold.surgery import recognise_units
from tenfold.tensors.free_memory import give_back
from tenfold.tensors.tensor_file import read_tensors, write_tensors
from tenfold.tracing.inputs import arguments, tensors_in

FORWARD, BACK = "run blocks", "weigh blocks"
_SKETCH = ("rows", "rest", "constant")  # of a Gram matrix, which has no targets


@dataclass(eq=False)
class Statistics:
    """The first pass, in a folder: what is there is not done again.

    Args:
        network: whose layers are weighed.
        folder: for files of the run.
        runtime: workers and progress.
    """

    network: Network
    folder: Path
    runtime: Runtime = field(default_factory=Runtime)
    _calls: BlockInputs | None = field(default=None, repr=False)

    def run(self) -> dict[str, OptionTable]:
        """Return the option tables of all parts, in order."""
        net = self.network
        parts = (TAIL, *reversed(net.chain.blocks), LEAD)
        if not all(self._rows(part).is_file() for part in parts):
            self._forward()
            count = self.runtime.counter(BACK)
            for done, part in enumerate(parts):
                if not self._rows(part).is_file():
                    self._weigh(part)
                count(done + 1, len(parts))
        return {part: OptionTable.load(self._rows(part)) for part in reversed(parts)}

    def output_grams(self, part: str) -> dict[str, Covariance]:
        """Return what errors of the outputs of a part's layers cost, by their paths in the part."""
        tensors, _ = read_tensors(self._grams(part))
        found: dict[str, Covariance] = {name: t for name, t in tensors.items() if "|" not in name}
        for path in {name.partition("|")[0] for name in tensors if "|" in name}:
            found[path] = Sketch(*(tensors[f"{path}|{name}"] for name in _SKETCH))
        return found

    @property
    def calls(self) -> BlockInputs:
        """What each block is called with besides hidden states."""
        if self._calls is None:
            net, first = self.network, self.entering(0)
            with net.outer() as outer:
                if first.is_file():
                    self._calls = BlockInputs.of(outer, net.chain, net.batches, lambda _: None)
                else:
                    with Activations.writing(first) as write:
                        self._calls = BlockInputs.of(outer, net.chain, net.batches, write)
        return self._calls

    def _forward(self) -> None:
        """Write what enters each block, and what the last one puts out."""
        depth = len(self.network.chain.blocks)
        calls, count = self.calls, self.runtime.counter(FORWARD)
        start = max((k for k in range(depth + 1) if self.entering(k).is_file()), default=0)
        if any(self._gradient(k).is_file() for k in range(depth + 1)):
            return  # it came to its end before
        for block in range(start, depth):
            self._step(calls, block)
            count(block + 1, depth)

    def _step(self, calls: BlockInputs, block: int) -> None:
        """Write what the next block takes, given what this one does."""
        net = self.network
        stored = Activations.of(self.entering(block))
        with net.block(block) as module, Activations.writing(self.entering(block + 1)) as write:
            for batch in block_calls(calls, block, stored, net.measured):
                write(run_block(module, batch))
        give_back()

    def _weigh(self, part: str) -> None:
        """Find the rows of a part, and the gradients that it sends back; the rows are there last."""
        net, every = self.network, range(len(self.network.batches))
        depth = len(net.chain.blocks)
        if part == LEAD:
            calls = StoredCalls(every, net.batches.__getitem__)
            with net.outer() as outer:
                found = self._weighed(part, Lead(outer, net.chain), calls, _SentBack(net, self._gradient(0)).add)
            self._keep(part, *found)
            self._gradient(0).unlink()
            return
        number = depth if part == TAIL else net.chain.blocks.index(part)
        stored = Activations.of(self.entering(number))
        with Activations.writing(self._gradient(number)) as write:
            if part == TAIL:
                with net.outer() as outer:
                    calls, module = tail_calls(net.batches, stored, every), Tail(outer, net.chain)
                    found = self._weighed(part, module, calls, _Sending(net, 0, write).at_the_end)
            else:
                place = net.chain.places[number]
                calls = block_calls(self.calls, number, stored, every)
                feed = _SentBack(net, self._gradient(number + 1), _Sending(net, place, write)).add
                with net.block(number) as block:
                    found = self._weighed(part, block, calls, feed)
        self._keep(part, *found)
        self._gradient(number + 1).unlink(missing_ok=True)
        if number:
            self.entering(number).unlink()

    def _weighed(
        self, part: str, module: nn.Module, calls: StoredCalls, feed: Feed
    ) -> tuple[OptionTable, dict[str, Covariance]]:
        """Return the table of a part, and what errors of the outputs of its layers cost."""
        net, paths = self.network, self.network.parts[part]
        recipe = recipe_of_part(net.recipe, part, paths, net.kept)
        cost = inside(net.profile, part, paths)
        if part not in (LEAD, TAIL) and wants_units(recipe):
            cost = cost.replace(units=recognise_units(module, cost, calls[0], kinds_of(recipe)))
        specs = changeable(module, cost, recipe)
        moments: dict[str, Moments] = {}
        if specs or part != LEAD:
            fitting, judging = (StoredCalls(numbers, calls.__getitem__) for numbers in (net.fitting, net.judging))
            settings, seed, ends = net.recipe.calibration, net.recipe.seed, part == TAIL
            found = calibrate_part(module, specs, fitting, judging, feed, settings, seed=seed, ends=ends)
            # A layer that no gradient reaches cannot be weighed against those of other parts, and stays as it is.
            moments = {path: own for path, own in found.items() if own.output_gram is not None}
        table = tabulate(module, cost, recipe, moments=moments, runtime=Runtime(workers=self.runtime.workers))
        return table, {path: own.output_gram for path, own in moments.items() if own.output_gram is not None}

    def _keep(self, part: str, table: OptionTable, grams: Mapping[str, Covariance]) -> None:
        tensors: dict[str, Tensor] = {}
        for path, gram in grams.items():
            if isinstance(gram, Sketch):
                tensors |= {f"{path}|{name}": getattr(gram, name) for name in _SKETCH}
            else:
                tensors[path] = gram
        with atomic_write(self._grams(part)) as partial:
            write_tensors(partial, {name: t.clone() for name, t in tensors.items()}, {}, ())
        table.save(self._rows(part))
        give_back()

    def entering(self, block: int) -> Path:
        """Return the file of what enters a block, or comes out of the last one."""
        return self.folder / f"x-{block:04d}"

    def _gradient(self, block: int) -> Path:
        return self.folder / f"g-{block:04d}"

    def _rows(self, part: str) -> Path:
        return self.folder / f"rows-{self._number(part)}.json"

    def _grams(self, part: str) -> Path:
        return self.folder / f"grams-{self._number(part)}.safetensors"

    def _number(self, part: str) -> str:
        return part if part in (LEAD, TAIL) else f"{self.network.chain.blocks.index(part):04d}"


@dataclass(eq=False)
class _Sending:
    """Writes the gradients at what enters a part, in the order in which the part is fed."""

    network: Network
    place: int
    write: Callable[[Tensor], None]
    written: int = 0

    def leaf(self, batch: Any) -> Tensor:
        """Return what the part before puts out, of which the gradient is written once it is known."""
        hidden = list(tensors_in(arguments(batch)))[self.place]
        return hidden.requires_grad_()

    def at_the_end(self, sums: GradientSums, model: nn.Module, batch: Any, number: int, draw: int) -> None:
        """Add a batch to the sums of the part whose outputs are those of the network."""
        with self.sending(sums, batch, self.network.index(sums, number, draw)):
            sums.add(model, batch)

    @contextmanager
    def sending(self, sums: GradientSums, batch: Any, index: int) -> Iterator[None]:
        """Write the gradient at what enters the part, on a batch that is added within."""
        if index != self.written:
            msg = "the outputs of some batches are built otherwise than those of others: pass batches of one structure"
            raise DataError(msg)
        hidden, found = self.leaf(batch), list[Tensor]()
        hidden.register_hook(found.append)
        sums.entered = (hidden,)
        try:
            yield
        finally:
            sums.entered = ()
        self.write(found[0] if found else torch.zeros_like(hidden))
        self.written += 1


@dataclass(eq=False)
class _SentBack:
    """Feeds a part the gradients at its output, which the parts behind it have sent back."""

    network: Network
    path: Path
    sending: _Sending | None = None
    stored: Activations = field(init=False)

    def __post_init__(self) -> None:
        """Open the file of the gradients."""
        self.stored = Activations.of(self.path)

    def add(self, sums: GradientSums, model: nn.Module, batch: Any, number: int, draw: int) -> None:
        """Add a batch to the sums of the part."""
        index = self.network.index(sums, number, draw)
        with nullcontext() if self.sending is None else self.sending.sending(sums, batch, index):
            sums.add_sent_back(model, batch, self.stored.read(index))
