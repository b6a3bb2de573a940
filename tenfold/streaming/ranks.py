"""Processes that compress one network together: which samples each has, and what they tell each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from tenfold.errors import DataError, TenfoldError
from tenfold.parallel import Workers

if TYPE_CHECKING:
    from accelerate import Accelerator

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")

PATIENCE = timedelta(days=2)  # the main process works alone on what lies outside of the blocks; a death is seen at once
_CHUNK = 1 << 22  # numbers that are summed at a time


@dataclass(frozen=True, eq=False)
class Ranks:
    """The processes of a run, of which each has a share of the batches. A single one by default.

    Attributes:
        index: of this process; 0 is the main one.
        count: of all.
        owners: which process has each batch.
    """

    index: int = 0
    count: int = 1
    owners: tuple[int, ...] = ()
    _group: Any = field(default=None, repr=False)

    @classmethod
    def of(cls, accelerator: Accelerator | None) -> Ranks:
        """Return the processes of an accelerator, or this one alone; sums go over the CPU."""
        return cls() if accelerator is None else cls.of_launch(accelerator.process_index, accelerator.num_processes)

    @classmethod
    def of_launch(cls, index: int, count: int) -> Ranks:
        """Return the processes that ``torch.distributed`` has connected."""
        if count == 1:
            return cls()
        return cls(index, count, (), torch.distributed.new_group(backend="gloo", timeout=PATIENCE))

    @property
    def main(self) -> bool:
        """Whether this is the process that writes what all share."""
        return self.index == 0

    def dealt(self, fitting: Sequence[int], judging: Sequence[int], batches: int) -> Ranks:
        """Return the processes with the batches of each kind dealt out to them in turn.

        Raises:
            DataError: some would have none that are fitted to, or none that judge.
        """
        if batches and min(len(fitting), len(judging)) < self.count:
            msg = f"there are too few batches for {self.count} processes: pass {16 * self.count} or more smaller ones"
            raise DataError(msg)
        rest = [number for number in range(batches) if number not in {*fitting, *judging}]
        owner = {number: place % self.count for kind in (fitting, judging, rest) for place, number in enumerate(kind)}
        return replace(self, owners=tuple(owner[number] for number in range(batches)))

    def own(self, numbers: Iterable[int], index: int | None = None) -> list[int]:
        """Return those of some batches that this process has, or another one."""
        wanted = self.index if index is None else index
        return [number for number in numbers if self.owners[number] == wanted]

    @cached_property
    def spots(self) -> list[tuple[int, int]]:
        """For each batch the process that has it, and its place among those of that process."""
        found, counts = [], [0] * self.count
        for owner in self.owners:
            found.append((owner, counts[owner]))
            counts[owner] += 1
        return found

    def everyones(self, value: Any) -> list[Any]:
        """Return the values of all processes, in their order."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, value, group=self._group)
        return found

    def summed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return sums over the processes, of what any of them has; use up the tensors."""
        if self.count == 1:
            return dict(tensors)
        shapes: dict[str, tuple[torch.Size, torch.dtype]] = {}
        for own in self.everyones({name: (t.shape, t.dtype) for name, t in tensors.items()}):
            shapes |= own
        found = {}
        for name in sorted(shapes):
            shape, dtype = shapes[name]
            total = tensors[name].contiguous() if name in tensors else torch.zeros(shape, dtype=dtype)
            for part in total.view(-1).split(_CHUNK):
                torch.distributed.all_reduce(part, group=self._group)
            found[name] = total
        return found

    def from_main(self, value: T) -> T:
        """Return the value of the main process."""
        sent: list[Any] = [value]
        if self.count > 1:
            torch.distributed.broadcast_object_list(sent, 0, group=self._group)
        found: T = sent[0]
        return found

    def file(self, path: Path) -> Path:
        """Return where this process writes what each has of its own."""
        return self.files(path)[self.index]

    def files(self, path: Path) -> list[Path]:
        """Return where all processes do."""
        return [path] if self.count == 1 else [path.with_name(f"{path.name}.{index}") for index in range(self.count)]

    def wait(self) -> None:
        """Wait until all processes are here: what each has written is there for all."""
        if self.count > 1:
            torch.distributed.barrier(group=self._group)

    def workers(self, otherwise: Workers) -> Workers:
        """Return what spreads independent work over the processes, or over ``otherwise`` where there is one."""
        return otherwise if self.count == 1 else _Spread(ranks=self)


@dataclass(frozen=True)
class _Spread(Workers):
    """The processes of a run as workers: all call ``map`` with the same items, and each does its share of them."""

    ranks: Ranks = field(default_factory=Ranks)

    @property
    def is_local(self) -> bool:
        """Never: functions are called elsewhere too."""
        return False

    def map(self, function: Callable[[S, T], R], shared: S, items: Iterable[T]) -> Iterator[R]:
        """Iterate over ``function(shared, item)`` in the order of the items: see ``Workers.map``."""
        ranks, done = self.ranks, dict[int, R]()
        failed: TenfoldError | None = None
        every = list(items)
        try:
            for number in range(ranks.index, len(every), ranks.count):
                done[number] = function(shared, every[number])
        except TenfoldError as error:  # of which all are to know
            failed = error
        found: dict[int, R] = {}
        for own, wrong in ranks.everyones((done, failed)):
            if wrong is not None:
                raise wrong
            found |= own
        return iter([found[number] for number in range(len(every))])
