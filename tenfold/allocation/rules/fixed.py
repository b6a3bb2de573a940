"""Ranks given by hand, by layer name, glob or regular expression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tenfold.allocation.rule import (
    RULES,
    Choice,
    Factorize,
    Keep,
    Limits,
    RankRule,
    UnreachableError,
    beyond,
    total_cost,
)
from tenfold.patterns import first_match
from tenfold.records import LayerOptions


@RULES.register("fixed")
@dataclass(frozen=True)
class Fixed(RankRule):
    """Ranks by layer: {pattern: rank}, where a rank is a number or {name: number}; the first matching pattern wins.

    A pattern is a path, a glob or ``re:`` and a regular expression. A plain number stands for all ranks of the format,
    which is the first that serves the layer. Layers without a rank are kept. A budget is checked, not aimed at. Use it
    to reproduce published ranks.
    """

    ranks: dict[str, int | dict[str, int]] = field(default_factory=dict)

    rows: ClassVar[str] = "given"
    by_name: ClassVar[bool] = True

    @property
    def tabulated_for(self) -> dict[str, Any]:
        """The ranks, which are the rows."""
        return {"ranks": self.ranks}

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns that ranks are given for."""
        return tuple(self.ranks)

    def select(self, layers: Sequence[LayerOptions], limits: Limits | None = None) -> tuple[Choice, ...]:
        """Return the given ranks, where they make their layer cheaper."""
        choices = tuple(self._choose(layer) for layer in layers)
        cost = total_cost(layers, choices)
        if limits and beyond(cost, limits):
            raise UnreachableError(cost, limits, what="the rule fixed with these ranks", advice="lower ranks")
        return choices

    def _choose(self, layer: LayerOptions) -> Choice:
        pattern = first_match(self.ranks, layer.path)
        if pattern is None:
            return Keep("no rank was given for this layer")
        options = layer.options[0]
        if not options.cost(0).below(layer.before):
            return Keep(f"{options.format} at the given rank would not make the layer cheaper")
        return Factorize(1, f"rank given for {pattern!r}")
