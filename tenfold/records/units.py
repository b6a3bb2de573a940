"""Groups of layers that are narrowed together, so that the result is a smaller ordinary network."""

from __future__ import annotations

from typing import Any

from pydantic import PositiveInt

from tenfold.records.base import Record


class Unit(Record):
    """Layers that can be narrowed together: hidden units of an MLP, heads of an attention, channels between two layers.

    One layer, the pivot, is replaced by a product of two matrices, W ≈ A B. The layers that feed it take over B: after
    that all are ordinary layers of smaller sizes, and no matrix product is added.

    Attributes:
        kind: name of the kind of unit, see ``tenfold list units``.
        path: of the module that holds the layers; empty for the model itself.
        pivot: path of the layer that is refitted.
        feeders: paths of the layers that take over the other factor, in the order in which the kind wants them.
        full: the sizes that it has now, by name: ``{"width": 3072}``.
        settings: what else the kind has to know, such as how many heads share one key.
        keep_reason: why it stays as it is, whatever the budget; None where there is a choice.
    """

    kind: str
    path: str
    pivot: str
    feeders: tuple[str, ...] = ()
    full: dict[str, PositiveInt] = {}
    settings: dict[str, Any] = {}
    keep_reason: str | None = None

    @property
    def key(self) -> str:
        """What tells it from others: its kind and its pivot. No path of a layer reads like that."""
        return f"{self.kind} of {self.pivot}"

    @property
    def members(self) -> tuple[str, ...]:
        """The paths of all its layers, the pivot last."""
        return (*self.feeders, self.pivot)

    def sized(self, size: dict[str, int]) -> str:
        """Return in words how a size differs from the full one.

        Example:
            >>> Unit(kind="mlp_width", path="", pivot="fc2", full={"width": 64}).sized({"width": 48})
            'width 64 → 48'
        """
        changed = {name: f" → {new}" if new < self.full[name] else "" for name, new in size.items()}
        return ", ".join(f"{name} {self.full[name]}{to}" for name, to in changed.items())
