"""Labeled batches as a function of the epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from itertools import chain
from typing import Any

from tenfold.errors import DataError

Batch = tuple[Any, Any]
Batches = Callable[[int], Iterable[Batch]] | Iterable[Batch]
"""(inputs, targets) pairs: a function of the epoch number, or a re-iterable such as a DataLoader."""


def at_epoch(batches: Batches, epoch: int) -> Iterable[Batch]:
    """Return the batches of one epoch, counted from 0.

    Raises:
        DataError: not a function and not something that can be gone through again and again.
    """
    data = batches(epoch) if callable(batches) else batches
    if not isinstance(data, Iterable) or (data is batches and iter(data) is data):
        msg = (
            f"batches of type {type(batches).__name__} serve one epoch at most. Pass a function of the epoch number "
            "that returns (inputs, targets) pairs, a list of them, or a DataLoader."
        )
        raise DataError(msg)
    return data


def count_steps(batches: Batches) -> int:
    """Return the number of batches in an epoch: ``len`` where there is one, else by going through epoch 0 once."""
    data = at_epoch(batches, 0)
    return len(data) if isinstance(data, Sized) else sum(1 for _ in data)


def peek(data: Iterable[Batch]) -> tuple[Any, Iterable[Batch]]:
    """Return the first inputs, and the batches with nothing lost.

    Raises:
        DataError: there are no batches.
    """
    iterator = iter(data)
    try:
        first = next(iterator)
    except StopIteration:
        msg = "there are no batches to train on. Pass at least one (inputs, targets) pair per epoch."
        raise DataError(msg) from None
    return as_pair(first)[0], chain([first], iterator)


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
