"""The first pass over a network: what each layer could become, block by block, forward and then back.

Forward, what enters each block is written to the disk. Back, from the last block to the first, each block runs once
more, with the gradient at its output that the blocks behind it sent back: its statistics become rows of the option
table, and go. What is in memory is one block, whatever the depth of the network or the number of samples.

Of several processes each runs the blocks on its own batches, and the sums become those of all. What lies outside of the
blocks is looked at by the main process alone, on all batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.calibration import calibrate_part
from tenfold.calibration.calibrate import Feed
from tenfold.calibration.gradients import GradientSums
from tenfold.calibration.judge import Judge
from tenfold.calibration.shares import Share
from tenfold.decompositions import Moments, Sketch
from tenfold.decompositions.covariance import Covariance
from tenfold.errors import DataError
from tenfold.files import atomic_write
from tenfold.planning import tabulate
from tenfold.planning.eligible import changeable
from tenfold.planning.unit_kinds import kinds_of, wants_units
from tenfold.records import OptionTable
from tenfold.runtime import Runtime
from tenfold.streaming.activations import Activations, ByBatch
from tenfold.streaming.network import Network
from tenfold.streaming.network_parts import BlockInputs, Lead, StoredCalls, Tail, block_calls, run_block, tail_calls
from tenfold.streaming.part_tables import LEAD, TAIL, inside, recipe_of_part
from tenfold.streaming.ranks import Ranks
from tenfold.surgery import recognise_units
from tenfold.tensors.free_memory import give_back
from tenfold.tensors.tensor_file import read_tensors, write_tensors
from tenfold.tracing.inputs import arguments, tensors_in

_Weighed = tuple[OptionTable, dict[str, Covariance]]  # rows of a part, and what errors of outputs of its layers cost

FORWARD, BACK = "run blocks", "weigh blocks"
_SKETCH = ("rows", "rest", "constant")  # of a Gram matrix, which has no targets


@dataclass(eq=False)
class Statistics:
    """The first pass, in a folder: what is there is not done again.

    Args:
        network: whose layers are weighed.
        folder: for files of the run, which all processes see.
        runtime: workers and progress.
        ranks: the processes of the run.
    """

    network: Network
    folder: Path
    runtime: Runtime = field(default_factory=Runtime)
    ranks: Ranks = field(default_factory=Ranks)
    _calls: BlockInputs | None = field(default=None, repr=False)

    def run(self) -> dict[str, OptionTable]:
        """Return the option tables of all parts, in order."""
        parts = (TAIL, *reversed(self.network.chain.blocks), LEAD)
        missing = self.ranks.from_main([part for part in parts if not self._rows(part).is_file()])
        if missing:
            self._forward()
            self.ranks.wait()
            count = self.runtime.counter(BACK)
            for done, part in enumerate(parts):
                if part in missing:
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

    def forget(self, part: str) -> None:
        """Remove what ``output_grams`` reads, once a part is fitted."""
        self._grams(part).unlink(missing_ok=True)

    @property
    def calls(self) -> BlockInputs:
        """What each block is called with besides hidden states."""
        if self._calls is None:
            net, first = self.network, self.entering(0)
            batches = {number: net.batches[number] for number in self.ranks.own(range(len(net.batches)))}
            with net.outer() as outer:
                if first.is_file():
                    self._calls = BlockInputs.of(outer, net.chain, batches, lambda _: None)
                else:
                    with Activations.writing(first) as write:
                        self._calls = BlockInputs.of(outer, net.chain, batches, write)
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
        net, stored = self.network, self.all_entering(block)
        with net.block(block) as module, Activations.writing(self.entering(block + 1)) as write:
            for batch in block_calls(calls, block, stored, self.ranks.own(net.measured)):
                write(run_block(module, batch))
        give_back()

    def _weigh(self, part: str) -> None:
        """Find the rows of a part, and the gradients that it sends back; the rows are there last."""
        depth = len(self.network.chain.blocks)
        number = {LEAD: 0, TAIL: depth}.get(part)
        if number is None:
            number = self.network.chain.blocks.index(part)
            found = self._weigh_block(part, number)
            self.ranks.wait()  # until all gradients are there
        elif self.ranks.main:
            found = self._weigh_outside(part, number)
        if self.ranks.main:
            self._keep(part, *found)
        self.ranks.wait()
        done = [self._gradient(0)] if part == LEAD else [self._gradient(number + 1)]
        if number and part != LEAD:
            done.append(self.entering(number))
        for path in done:
            path.unlink(missing_ok=True)
        give_back()

    def _weigh_block(self, part: str, number: int) -> _Weighed:
        net, ranks = self.network, self.ranks
        feeding = _Feeding(net, ranks, ranks.own(net.fitting), ranks.own(net.judging))
        with Activations.writing(self._gradient(number)) as write:
            sending = _Sending(feeding, net.chain.places[number], {ranks.index: write})
            feed = _SentBack(feeding, self._gradients(number + 1), sending).add
            with net.block(number) as block:
                calls = block_calls(self.calls, number, self.all_entering(number), range(len(net.batches)))
                return self._weighed(part, block, calls, feed, feeding)

    def _weigh_outside(self, part: str, number: int) -> _Weighed:
        net, every = self.network, range(len(self.network.batches))
        feeding = _Feeding(net, self.ranks, net.fitting, net.judging)
        with net.outer() as outer:
            if part == LEAD:
                feed = _SentBack(feeding, self._gradients(0)).add
                return self._weighed(
                    part, Lead(outer, net.chain), StoredCalls(every, net.batches.__getitem__), feed, feeding
                )
            with Activations.writing_all(self._gradients(number)) as writers:
                calls = tail_calls(net.batches, self.all_entering(number), every)
                feed = _Sending(feeding, 0, dict(enumerate(writers))).at_the_end
                return self._weighed(part, Tail(outer, net.chain), calls, feed, feeding)

    def _weighed(self, part: str, module: nn.Module, calls: StoredCalls, feed: Feed, feeding: _Feeding) -> _Weighed:
        """Return the table of a part, and what errors of the outputs of its layers cost."""
        net, paths = self.network, self.network.parts[part]
        recipe = recipe_of_part(net.recipe, part, paths, net.kept)
        cost = inside(net.profile, part, paths)
        if part not in (LEAD, TAIL) and wants_units(recipe):
            first = calls[feeding.fitting[0]]
            cost = cost.replace(units=recognise_units(module, cost, first, kinds_of(recipe)))
        specs = changeable(module, cost, recipe)
        moments: dict[str, Moments] = {}
        if specs or part != LEAD:
            fitting, judging = feeding.share(calls)
            settings, seed, ends = net.recipe.calibration, net.recipe.seed, part == TAIL
            found = calibrate_part(module, specs, fitting, judging, feed, settings, seed=seed, ends=ends)
            # A layer that no gradient reaches cannot be weighed against those of other parts, and stays as it is.
            moments = {path: own for path, own in found.items() if own.output_gram is not None}
        workers = self.runtime.workers if part in (LEAD, TAIL) else self.ranks.workers(self.runtime.workers)
        table = tabulate(module, cost, recipe, moments=moments, runtime=Runtime(workers=workers))
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
        """Return the file of what enters a block, or comes out of the last one, on the batches of this process."""
        return self.ranks.file(self.folder / f"x-{block:04d}")

    def all_entering(self, block: int) -> ByBatch:
        """Return what enters a block, or comes out of the last one, on any batch."""
        return ByBatch(self.ranks.files(self.folder / f"x-{block:04d}"), self.ranks.spots)

    def _gradient(self, block: int) -> Path:
        return self.ranks.file(self.folder / f"g-{block:04d}")

    def _gradients(self, block: int) -> list[Path]:
        return self.ranks.files(self.folder / f"g-{block:04d}")

    def _rows(self, part: str) -> Path:
        return self.folder / f"rows-{self._number(part)}.json"

    def _grams(self, part: str) -> Path:
        return self.folder / f"grams-{self._number(part)}.safetensors"

    def _number(self, part: str) -> str:
        return part if part in (LEAD, TAIL) else f"{self.network.chain.blocks.index(part):04d}"


@dataclass(eq=False)
class _Feeding:
    """Which batches a part is fed, by this process or by the main one alone, and whose each of them is."""

    network: Network
    ranks: Ranks
    fitting: Sequence[int]
    judging: Sequence[int]

    def share(self, calls: StoredCalls) -> tuple[Sequence[Any], Sequence[Any]]:
        """Return the batches that are fitted to and those that judge."""
        own = self.fitting, self.judging
        fitting, judging = (StoredCalls(numbers, calls.__getitem__) for numbers in own)
        every = self.network.fitting, self.network.judging
        if [len(numbers) for numbers in own] == [len(numbers) for numbers in every]:
            return fitting, judging
        first, second = (
            [numbers.index(number) for number in some] for numbers, some in zip(map(list, every), own, strict=True)
        )
        return Share(fitting, first, self.ranks), Share(judging, second, self.ranks)

    def place(self, sums: GradientSums, number: int, draw: int) -> tuple[int, int]:
        """Return whose a batch is, and the place of its gradient among those of all batches and draws of that one."""
        net, judges = self.network, isinstance(sums, Judge)
        batch = (self.judging if judges else self.fitting)[number]
        owner, _ = self.ranks.spots[batch]
        fitting, judging = self.ranks.own(net.fitting, owner), self.ranks.own(net.judging, owner)
        if judges:
            before = net.recipe.calibration.draws * len(fitting)
            return owner, before + draw * len(judging) + judging.index(batch)
        return owner, draw * len(fitting) + fitting.index(batch)


@dataclass(eq=False)
class _Sending:
    """Writes the gradients at what enters a part, in the order in which the part is fed."""

    feeding: _Feeding
    place: int
    write: Mapping[int, Callable[[Tensor], None]]
    written: dict[int, int] = field(default_factory=dict)

    def leaf(self, batch: Any) -> Tensor:
        """Return what the part before puts out, of which the gradient is written once it is known."""
        hidden = list(tensors_in(arguments(batch)))[self.place]
        return hidden.requires_grad_()

    def at_the_end(self, sums: GradientSums, model: nn.Module, batch: Any, number: int, draw: int) -> None:
        """Add a batch to the sums of the part whose outputs are those of the network."""
        with self.sending(sums, batch, self.feeding.place(sums, number, draw)):
            sums.add(model, batch)

    @contextmanager
    def sending(self, sums: GradientSums, batch: Any, place: tuple[int, int]) -> Iterator[None]:
        """Write the gradient at what enters the part, on a batch that is added within."""
        owner, index = place
        if index != self.written.get(owner, 0):
            msg = "the outputs of some batches are built otherwise than those of others: pass batches of one structure"
            raise DataError(msg)
        hidden, found = self.leaf(batch), list[Tensor]()
        hidden.register_hook(found.append)
        sums.entered = (hidden,)
        try:
            yield
        finally:
            sums.entered = ()
        self.write[owner](found[0] if found else torch.zeros_like(hidden))
        self.written[owner] = index + 1


@dataclass(eq=False)
class _SentBack:
    """Feeds a part the gradients at its output, which the parts behind it have sent back."""

    feeding: _Feeding
    paths: Sequence[Path]
    sending: _Sending | None = None
    stored: Callable[[Path], Activations] = field(default_factory=lambda: cache(Activations.of), init=False)

    def add(self, sums: GradientSums, model: nn.Module, batch: Any, number: int, draw: int) -> None:
        """Add a batch to the sums of the part."""
        owner, index = place = self.feeding.place(sums, number, draw)
        with nullcontext() if self.sending is None else self.sending.sending(sums, batch, place):
            sums.add_sent_back(model, batch, self.stored(self.paths[owner]).read(index))
