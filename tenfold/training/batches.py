"""Labeled batches as a function of the epoch, their random state, and the share of each process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from itertools import chain, islice
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from tenfold.errors import DataError

T = TypeVar("T")

Batch = tuple[Any, Any]
Batches = Callable[[int], Iterable[Batch]] | Iterable[Batch]
"""(inputs, targets) pairs: a function of the epoch number, or a re-iterable such as a DataLoader."""


def at_epoch(batches: Batches, epoch: int) -> Iterable[Batch]:
    """Return the batches of one epoch, counted from 0.

    Raises:
        DataError: neither a function nor an iterable that can be repeated.
    """
    data = batches(epoch) if callable(batches) else batches
    if not isinstance(data, Iterable) or (data is batches and iter(data) is data):
        msg = (
            f"batches of type {type(batches).__name__} serve one epoch at most. Pass a function of the epoch number "
            "that returns (inputs, targets) pairs, a list of them, or a DataLoader."
        )
        raise DataError(msg)
    return data


def seed_epoch(device: torch.device, seed: int, epoch: int, process: int = 0) -> None:
    """Make all randomness of an epoch a function of the seed and its number, so that no random state is stored."""
    value = (seed * 1_000_003 + epoch + process * 7_368_787_001) % 2**63
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(value)


def count_steps(batches: Batches) -> int:
    """Return the number of batches in an epoch: ``len`` if available, else by iterating over epoch 0."""
    data = at_epoch(batches, 0)
    return len(data) if isinstance(data, Sized) else sum(1 for _ in data)


def share(data: Iterable[Batch], index: int, count: int) -> Iterator[Batch]:
    """Return every ``count``-th batch from ``index`` on, equally many for each process; the first fill the last round.

    All processes must be given the same batches in the same order. Batches are drawn in a random state of their own,
    the one at the time of the call, so that random numbers drawn by training do not change them. A DataLoader reads
    only the samples of the share; other iterables make all batches, and the rest is dropped.

    Raises:
        DataError: batches that are divided up already.
    """
    if isinstance(data, DataLoader) and (
        isinstance(data.sampler, DistributedSampler) or getattr(data, "_is_accelerate_prepared", False)
    ):
        msg = "the DataLoader is divided up among the processes already: pass a plain one, and leave that to finetune"
        raise DataError(msg)
    if type(data) is DataLoader and data.batch_sampler is not None and not isinstance(data.dataset, IterableDataset):
        return _in_own_state(_loader_of(data, index, count))
    return _in_own_state(_every(data, index, count))


def grouped(data: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of ``size`` elements; the last may be shorter."""
    iterator = iter(data)
    while group := list(islice(iterator, size)):
        yield group


def _every(data: Iterable[T], index: int, count: int) -> Iterator[T]:
    first: list[T] = []
    number = -1
    for number, batch in enumerate(data):
        if number < count:
            first.append(batch)
        if number % count == index:
            yield batch
    rest = (number + 1) % count
    if rest and index >= rest:
        yield first[(index - rest) % len(first)]


class _Every:
    """Every ``count``-th list of indices of a batch sampler, from ``index`` on."""

    def __init__(self, sampler: Iterable[list[int]], index: int, count: int) -> None:
        self._sampler, self._index, self._count = sampler, index, count

    def __iter__(self) -> Iterator[list[int]]:
        return _every(self._sampler, self._index, self._count)


def _loader_of(loader: DataLoader[Any], index: int, count: int) -> DataLoader[Any]:
    """Return a copy of the loader that reads a share of the batches."""
    names = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context")
    settings: dict[str, Any] = {name: getattr(loader, name) for name in (*names, "generator", "prefetch_factor")}
    sampler: Any = _Every(loader.batch_sampler, index, count)  # type: ignore[arg-type]
    return DataLoader(loader.dataset, batch_sampler=sampler, **settings)


def _in_own_state(data: Iterable[T]) -> Iterator[T]:
    """Iterate in a copy of torch's global random state at the time of the call, and leave that state alone."""
    return _swapping(data, torch.get_rng_state())  # read here: the body of a generator runs later


def _swapping(data: Iterable[T], state: torch.Tensor) -> Iterator[T]:
    iterator: Iterator[T] | None = None
    while True:
        outside = torch.get_rng_state()
        torch.set_rng_state(state)
        try:
            iterator = iter(data) if iterator is None else iterator
            item = next(iterator)
        except StopIteration:
            return
        finally:
            state = torch.get_rng_state()
            torch.set_rng_state(outside)
        yield item


def peek(data: Iterable[Batch]) -> tuple[Batch, Iterable[Batch]]:
    """Return the first batch, and all of them.

    Raises:
        DataError: there are no batches.
    """
    iterator = iter(data)
    try:
        first = next(iterator)
    except StopIteration:
        msg = "there are no batches to train on. Pass at least one (inputs, targets) pair per epoch."
        raise DataError(msg) from None
    return as_pair(first), chain([first], iterator)


def as_pair(batch: Any) -> Batch:
    """Return the batch as inputs and targets.

    Raises:
        DataError: the batch is not a pair.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        msg = (
            f"a batch must be a pair (inputs, targets), not a {type(batch).__name__}{size}. Several inputs go into a "
            "tuple or dict: ((x1, x2), targets). Without targets, pass (inputs, None) and your own loss."
        )
        raise DataError(msg)
    return batch[0], batch[1]
