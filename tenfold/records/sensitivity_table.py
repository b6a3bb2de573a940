"""Per-layer sensitivity and trade-off curves, as measured, to keep on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import NonNegativeFloat, model_validator

from tenfold.records.base import Record
from tenfold.records.costs import Cost
from tenfold.records.metric import FRACTION, Metric

SENSITIVITY_VERSION = 2  # 1 had no digests of the data, and only algorithms that were not the default
TRADEOFF_VERSION = 1


class SensitivityPoint(Record):
    """One layer in one format at one rank, alone in an otherwise untouched model.

    ``output_error`` is ‖y − ŷ‖/‖y − ȳ‖ of the layer's output on calibration inputs (that of the weight where there were
    none); ``score`` is that of the whole model. None is what nobody measured.
    """

    format: str
    rank: dict[str, int]
    cost: Cost
    output_error: NonNegativeFloat | None = None
    score: float | None = None

    def filled(self, other: SensitivityPoint) -> SensitivityPoint:
        """Return the point with what only the other one measured."""
        return other.model_copy(update={k: v for k, v in dict(self).items() if v is not None})


class LayerSensitivity(Record):
    """What was measured of one layer.

    A layer that cannot be compressed has that as its state, with the ``reason``: it is not a "robust" one.
    """

    path: str
    kind: str
    before: Cost
    state: Literal["compressible", "not compressible"]
    reason: str = ""
    points: tuple[SensitivityPoint, ...] = ()

    def curve(self, format: str) -> tuple[SensitivityPoint, ...]:
        """Return the points of one format, the cheapest first."""
        own = [point for point in self.points if point.format == format]
        return tuple(sorted(own, key=lambda p: (p.cost.macs, p.cost.params)))

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats that were measured, in order."""
        return tuple(dict.fromkeys(point.format for point in self.points))


class SensitivityKey(Record):
    """All that the measurements depend on; only with the same key are they taken over.

    ``model`` is a digest of all weights, ``data`` of the calibration batches, of which there are ``samples``, and
    ``moments`` of those given; they are empty where there are none. ``algorithms`` are those that find the factors, by
    format, defaults included: two where only some layers have moments. ``about`` is what the caller says of the scores:
    task, split, number of images.
    """

    model: str
    samples: int = 0
    data: str = ""
    seed: int = 0
    batchnorm: bool = False
    moments: str = ""
    algorithms: dict[str, tuple[dict[str, Any], ...]] = {}
    about: dict[str, str | int | float | None] = {}

    def differences(self, other: SensitivityKey) -> list[str]:
        """Return in words where two keys differ; formats that only one of them knows are no difference."""
        pairs = {name: (value, getattr(other, name)) for name, value in self if name != "algorithms"}
        for format in sorted(set(self.algorithms) & set(other.algorithms)):
            pairs[f"algorithms of {format}"] = self.algorithms[format], other.algorithms[format]
        return [f"{name} ({there!r}, now {now!r})" for name, (there, now) in pairs.items() if there != now]

    def joined(self, other: SensitivityKey) -> SensitivityKey:
        """Return the key of a table that holds the measurements under both, which differ in formats alone."""
        return self.replace(algorithms={**other.algorithms, **self.algorithms})


class SensitivityTable(Record):
    """Error and score of every layer, replaced alone, at some ranks.

    ``baseline`` is the score of the whole model, ``metric`` what scores are.
    """

    version: int = SENSITIVITY_VERSION
    tenfold: str
    model: str
    key: SensitivityKey
    baseline: float | None = None
    metric: Metric = FRACTION
    layers: tuple[LayerSensitivity, ...]

    @model_validator(mode="before")
    @classmethod
    def _check(cls, values: Any) -> Any:
        version = values.get("version") if isinstance(values, dict) else None
        if version == 1:
            msg = "version 1 does not tell on which data it was measured: choose another file, or delete this one"
            raise ValueError(msg)
        if isinstance(version, int) and version > SENSITIVITY_VERSION:
            msg = f"it has version {version}, this tenfold reads up to {SENSITIVITY_VERSION}: upgrade tenfold"
            raise ValueError(msg)
        return values

    @property
    def compressible(self) -> tuple[LayerSensitivity, ...]:
        """The layers that can be compressed."""
        return tuple(layer for layer in self.layers if layer.state == "compressible")

    def layer(self, path: str) -> LayerSensitivity:
        """Return the layer at ``path``; raises KeyError when there is none."""
        for layer in self.layers:
            if layer.path == path:
                return layer
        raise KeyError(path)

    def save(self, path: str | Path) -> None:
        """Write the table to ``path`` as JSON, whole or not at all."""
        self.save_sealed(Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a table from a JSON file.

        Raises:
            DataError: the file is missing, is not such a table, or was written by a newer version.
        """
        return cls.from_json_file(path, "a sensitivity table")


class TradeOffPoint(Record):
    """The plan for one budget: what it costs, the distortion that it predicts, and the score if it was carried out."""

    budget: float
    cost: Cost
    distortion: float | None = None
    score: float | None = None


class TradeOff(Record):
    """Plans for several budgets of one kind (``params``, ``macs`` or ``latency``), the smallest first.

    ``distortion`` tells in words what is predicted, ``metric`` what scores are. Budgets that no plan can meet are in
    ``unreachable``.
    """

    version: int = TRADEOFF_VERSION
    model: str
    budget: str
    rule: dict[str, Any] = {}
    distortion: str = ""
    before: Cost
    baseline: float | None = None
    metric: Metric = FRACTION
    points: tuple[TradeOffPoint, ...]
    unreachable: tuple[float, ...] = ()
