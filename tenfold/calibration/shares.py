"""Samples that are spread over processes: what each has of them, and how sums become those of all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor


class Together(Protocol):
    """Processes that work on one model, each on samples of its own; all call these in the same order."""

    def everyones(self, value: Any) -> list[Any]:
        """Return the values of all processes, in their order."""

    def summed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return sums over the processes, of what any of them has; use up the tensors."""


class Share(Sequence[Any]):
    """Those batches that this process has; other processes have the others.

    Args:
        batches: of this process.
        places: of these among the batches of all.
        together: all processes.
    """

    def __init__(self, batches: Sequence[Any], places: Sequence[int], together: Together) -> None:
        self.batches, self.places, self.together = batches, places, together

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, place: Any) -> Any:
        return self.batches[place]


def together_of(batches: Iterable[Any]) -> Together | None:
    """Return the processes that batches are spread over, or None where this one has them all."""
    return batches.together if isinstance(batches, Share) else None


def over_all(batches: Iterable[Any], count: int) -> int:
    """Return what all processes count together in their shares of the batches, of which this one counts so many."""
    together = together_of(batches)
    return count if together is None else sum(together.everyones(count))
