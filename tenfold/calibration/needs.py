"""What calibration and the fits after it will take of memory, said before it is taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from tenfold.calibration.gradients import output_sketch_rows
from tenfold.calibration.moment_sums import moment_bytes
from tenfold.records import LayerSpec
from tenfold.records.sizes import size_in_words

# While a product is added to a sum, or a covariance is made of one, there are so many more matrices of its size.
_AT_WORK = 3
_SHOWN = 3


@dataclass(frozen=True)
class Needs:
    """An upper estimate in bytes.

    Attributes:
        statistics: what is held of each layer until all are fitted, by path.
        work: of the layer that takes the most while it is fitted: its statistics in several forms, its weights in
            float64.
        gradients: activations that one forward holds for its backward pass.
        activations: of all batches in one model, as far as at some layer something still reads them.
    """

    statistics: Mapping[str, int] = field(repr=False)
    work: int
    gradients: int
    activations: int

    @classmethod
    def of(cls, specs: Mapping[str, LayerSpec], widest: int | None, gradients: int, activations: int) -> Needs:
        """Return what these layers take; see ``moment_bytes`` for ``widest``."""
        held = {path: statistics_bytes(spec, widest) for path, spec in specs.items()}
        weights = {path: 8 * prod(spec.group_shape) for path, spec in specs.items()}
        work = max((_AT_WORK * (held[path] + weights[path]) for path in specs), default=0)
        return cls(held, work, gradients, activations)

    def in_words(self, cache: int) -> str:
        """Return it as one line, with ``cache`` bytes of activations that fits may hold of each of two models."""
        largest = sorted(self.statistics, key=lambda path: -self.statistics[path])[:_SHOWN]
        shown = ", ".join(f"{path} {size_in_words(self.statistics[path])}" for path in largest)
        held, cached = sum(self.statistics.values()), 2 * min(cache, self.activations)
        most = held + max(self.gradients, self.work + cached)
        layers = f"{len(self.statistics)} layer{'s' * (len(self.statistics) > 1)}"
        parts = [
            f"statistics of {layers} {size_in_words(held)} ({shown})",
            f"the backward pass {size_in_words(self.gradients)}",
            f"fits {size_in_words(self.work)}",
            f"activations {size_in_words(cached)}",
        ]
        return f"calibration takes up to {size_in_words(most)} beside the model: {', '.join(parts)}"


def statistics_bytes(spec: LayerSpec, widest: int | None = None) -> int:
    """Return an upper bound on the bytes that a layer's moments and its output Gram matrix take.

    Example:
        >>> statistics_bytes(LayerSpec(kind="linear", in_channels=100, out_channels=10))
        81600
        >>> statistics_bytes(LayerSpec(kind="linear", in_channels=768, out_channels=50257)) // 2**20  # MiB
        53
    """
    groups, outputs = spec.group_shape[:2]
    rows = output_sketch_rows(spec, widest)
    if rows is None:
        gram = 8 * groups * outputs * outputs
    else:
        gram = groups * (8 * (rows + 2) * outputs) + 4 * rows * outputs
    return moment_bytes({"": spec}, widest=widest) + gram
