"""How far a compressed model agrees with its original on inputs without labels."""

from __future__ import annotations

from math import sqrt

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from tenfold.records.base import Record

FEW = 10  # samples, below which nothing can be said
LEAST_TOP1 = 0.5
MOST_ERROR = 0.5
_Z = 1.96


class Agreement(Record):
    """Outputs of a compressed model against those of the original, on the same inputs.

    Attributes:
        samples: number of inputs.
        held_out: whether neither plan nor factors have seen them. What was fitted to them agrees on them by design.
        rows: decisions compared: samples, or real tokens of sequences; None where outputs are no scores of classes.
        top1: share of them with the same largest score.
        kl: mean divergence of the class probabilities from those of the original, in nats.
        cosine: mean cosine of the output vectors.
        relative_error: ‖y − ŷ‖/‖y‖ over all outputs.
    """

    samples: NonNegativeInt
    held_out: bool = True
    rows: NonNegativeInt | None = None
    top1: float | None = Field(default=None, ge=0, le=1)
    kl: NonNegativeFloat | None = None
    cosine: float | None = None
    relative_error: NonNegativeFloat

    @property
    def can_be_judged(self) -> bool:
        """Whether there are enough samples to say anything."""
        return self.samples >= FEW

    @property
    def is_equal(self) -> bool:
        """Whether the outputs are the same to the last bit: they do not depend on what was changed."""
        return self.relative_error == 0

    @property
    def divergence(self) -> float:
        """What the outputs diverge by, to compare and to add up: ``kl``, or the squared relative error without one."""
        return self.relative_error**2 if self.kl is None else self.kl

    @property
    def is_low(self) -> bool:
        """Whether the model no longer does what the original does.

        Fewer than half of its decisions are the same; or, of outputs that are none, the error is half as large as they.
        """
        return self.relative_error > MOST_ERROR if self.top1 is None else self.top1 < LEAST_TOP1

    def interval(self) -> tuple[float, float] | None:
        """Return the 95 % interval of ``top1`` for inputs of the same kind (Wilson 1927, JASA 22).

        Tokens of one sequence are not independent, so samples are counted.

        Example:
            >>> [round(x, 2) for x in Agreement(samples=50, top1=0.5, relative_error=0.1).interval()]
            [0.37, 0.63]
        """
        if self.top1 is None or not self.samples:
            return None
        n, p = self.samples, self.top1
        middle = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        half = _Z / (1 + _Z**2 / n) * sqrt(p * (1 - p) / n + _Z**2 / (4 * n * n))
        return max(middle - half, 0.0), min(middle + half, 1.0)

    def where(self) -> str:
        """Return on what it was measured, in words."""
        samples = "sample" if self.samples == 1 else "samples"
        return f"{self.samples} held-out {samples}" if self.held_out else f"the {self.samples} {samples} fitted to"

    def in_words(self) -> str:
        """Return the figures and on what they were measured, in a line.

        Example:
            >>> Agreement(samples=4, relative_error=0.25, cosine=0.97).in_words()
            'relative error 0.250, cosine 0.970 on 4 held-out samples (too few to judge)'
        """
        few = "" if self.can_be_judged else " (too few to judge)"
        return f"{self.figures()} on {self.where()}{few}"

    def figures(self) -> str:
        """Return the figures alone."""
        if self.is_equal:
            return "outputs equal to the last bit"
        parts = []
        interval = self.interval()
        if self.top1 is not None and interval is not None:
            parts.append(f"same top-1 in {self.top1:.1%} ({interval[0]:.0%} to {interval[1]:.0%})")
        parts.append(f"relative error {self.relative_error:.3f}")
        if self.kl is not None:
            parts.append(f"KL {self.kl:.3f}")
        if self.cosine is not None:
            parts.append(f"cosine {self.cosine:.3f}")
        return ", ".join(parts)
