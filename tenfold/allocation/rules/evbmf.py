"""Ranks that stand out of the noise, weakened: MUSCO's rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from tenfold.allocation.rule import RULES, Choice, Keep, Limits, UnreachableError, beyond, total_cost
from tenfold.allocation.rules.threshold import ThresholdRule
from tenfold.errors import TenfoldError
from tenfold.records import FormatOptions, LayerOptions

Threshold = Literal["approximate", "exact"]


@RULES.register("evbmf")
@dataclass(frozen=True)
class EVBMF(ThresholdRule):
    """Ranks that stand out of the noise (EVBMF), weakened: no data, no budget and no tolerance needed.

    Each unfolding of the format gets the rank that ``evbmf`` finds in its spectrum (Kim et al. 2016, arXiv 1511.06530);
    these ranks are extreme, so only the share ``weaken`` of the way from the present rank down to them is gone at once
    (MUSCO: Gusak et al. 2019, arXiv 1903.09973). An unfolding that is all noise keeps its rank. With a budget,
    ``weaken`` is found that meets it. Use it for MUSCO's schedules.

    The groups of a convolution share one rank, found in their pooled spectrum. The k-th largest squares of g groups add
    up to g times a typical group's, so this is the spectrum of one group at a larger scale: it counts as a matrix with
    the columns of one group (with g times as many, pure noise would be taken for structure).

    Where the layer has the format already, the spectrum is that of its core: as many values as the rank is now, and
    as many columns as the other ranks leave.

    Attributes:
        weaken: in [0, 1]; 1 takes the EVBMF rank itself, 0 changes nothing. MUSCO uses 0.7 to 0.9.
        min_rank: no rank is taken below this one.
        threshold: ``approximate`` or ``exact``, see ``evbmf``.
    """

    weaken: float = 0.8
    min_rank: int = 8
    threshold: Threshold = "approximate"

    rows: ClassVar[str] = "weakened"

    def __post_init__(self) -> None:
        if not 0 <= self.weaken <= 1:
            msg = f"weaken={self.weaken} must be in [0, 1]: the share of the way down to the EVBMF rank"
            raise TenfoldError(msg)
        if isinstance(self.min_rank, bool) or self.min_rank < 1:
            msg = f"min_rank={self.min_rank} must be a whole number from 1 on"
            raise TenfoldError(msg)
        if self.threshold not in get_args(Threshold):
            msg = f"threshold={self.threshold!r} must be {' or '.join(get_args(Threshold))}"
            raise TenfoldError(msg)

    @property
    def tabulated_for(self) -> dict[str, Any]:
        """All but how far ranks are weakened, of which there is a row for every rank."""
        return {"min_rank": self.min_rank, "threshold": self.threshold}

    def level(self) -> float | None:
        """Return the share of the way that is left out."""
        return 1 - self.weaken

    def note(self, level: float) -> str:
        """Return how far the ranks are weakened, in words."""
        return f"EVBMF ranks, weakened by {1 - level:.3g}"

    def choose(self, layer: LayerOptions, level: float) -> Choice:
        """Return the weakened EVBMF ranks in the first format that they make cheaper."""
        if not any(len(options) for options in layer.options):
            return Keep("EVBMF finds nothing but noise in this weight")
        return super().choose(layer, level)

    def row(self, layer: LayerOptions, options: FormatOptions, level: float) -> int | None:
        """Return the ranks at this weakening: rows hold up to the weakening in their column, the last one for more."""
        del layer
        if not len(options):
            return None
        (reached,) = np.nonzero(options.columns["weaken"] >= 1 - level)
        return int(reached[0]) if len(reached) else len(options) - 1

    def select(self, layers: Sequence[LayerOptions], limits: Limits | None = None) -> tuple[Choice, ...]:
        """Return the choices at the configured ``weaken``, or at the smallest one that respects the limits."""
        if not limits:
            return super().select(layers)
        least = total_cost(layers, [self.choose(layer, 0.0) for layer in layers])
        if beyond(least, limits):
            advice = "lower min_rank, or use a rule such as ratio or energy"
            raise UnreachableError(least, limits, what="EVBMF, weakened as far as may be,", advice=advice)
        return self.within_limits(layers, limits)
