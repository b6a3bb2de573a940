"""What the weights of a model said before it was compressed: enough to draw why the ranks are what they are."""

from __future__ import annotations

from pydantic import NonNegativeFloat, PositiveInt, model_validator

from tenfold.records.base import Record
from tenfold.records.costs import Cost

ANALYSIS_VERSION = 1


class Spectrum(Record):
    """The singular values of one unfolding of a weight, the largest set to 1, thinned out where there are many.

    ``index`` are the places of the kept ``values``, counted from 1; the first and the last are always there.
    """

    index: tuple[PositiveInt, ...]
    values: tuple[NonNegativeFloat, ...]

    @model_validator(mode="after")
    def _paired(self) -> Spectrum:
        if len(self.index) != len(self.values) or not self.index:
            msg = f"{len(self.index)} places and {len(self.values)} values: there must be as many, and one at least"
            raise ValueError(msg)
        return self


class CurvePoint(Record):
    """What a layer would cost at a rank, and the relative error of its weight there."""

    rank: dict[str, PositiveInt]
    cost: Cost
    error: NonNegativeFloat


class LayerAnalysis(Record):
    """One layer that was factorized: its spectra by the name of the rank, and its error along one family of ranks."""

    path: str
    format: str
    spectra: dict[str, Spectrum] = {}
    curve: tuple[CurvePoint, ...] = ()


class Analysis(Record):
    """The layers of a run, by their weights alone. Lies as ``analysis.json`` beside a record, and may be missing.

    Example:
        >>> Analysis(tenfold="0.1", layers=()).layer("conv1") is None
        True
    """

    version: int = ANALYSIS_VERSION
    tenfold: str
    layers: tuple[LayerAnalysis, ...]

    @model_validator(mode="after")
    def _check(self) -> Analysis:
        if self.version > ANALYSIS_VERSION:
            msg = f"it has version {self.version}, this tenfold reads up to {ANALYSIS_VERSION}: upgrade tenfold"
            raise ValueError(msg)
        return self

    def layer(self, path: str) -> LayerAnalysis | None:
        """Return what is known of the layer at ``path``; None where that is nothing."""
        return next((layer for layer in self.layers if layer.path == path), None)
