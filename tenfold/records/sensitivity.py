"""How much a model minds that one of its layers is factorized, and what budgets cost it: as measured, to keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import NonNegativeFloat, ValidationError

from tenfold.errors import DataError
from tenfold.records.base import Record, explain, write_text
from tenfold.records.costs import Cost

SENSITIVITY_VERSION = 1


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

    ``model`` is a digest of all weights. ``algorithms`` are those that differ from the default of their format.
    ``about`` is what the caller says of the scores: task, split, number of images.
    """

    model: str
    samples: int = 0
    seed: int = 0
    batchnorm: bool = False
    moments: bool = False
    algorithms: dict[str, dict[str, Any]] = {}
    about: dict[str, str | int | float | None] = {}

    def differences(self, other: SensitivityKey) -> list[str]:
        """Return in words where two keys differ."""
        return [
            f"{name} ({getattr(self, name)!r}, now {getattr(other, name)!r})"
            for name in type(self).model_fields
            if getattr(self, name) != getattr(other, name)
        ]


class SensitivityTable(Record):
    """Error and score of every layer, replaced alone, at some ranks. ``baseline`` is the score of the whole model."""

    version: int = SENSITIVITY_VERSION
    tenfold: str
    model: str
    key: SensitivityKey
    baseline: float | None = None
    layers: tuple[LayerSensitivity, ...]

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
        write_text(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a table from a JSON file.

        Raises:
            DataError: the file is missing, is not such a table, or was written by a newer version.
        """
        path = Path(path)
        try:
            table = cls.model_validate_json(path.read_bytes())
        except OSError as error:
            msg = f"cannot read the sensitivity table {path}: {error.strerror or error}"
            raise DataError(msg) from error
        except ValidationError as error:
            msg = f"{path} is not a sensitivity table: {explain(error)}"
            raise DataError(msg) from error
        if table.version > SENSITIVITY_VERSION:
            msg = f"{path} has version {table.version}, this tenfold reads up to {SENSITIVITY_VERSION}: upgrade tenfold"
            raise DataError(msg)
        return table


class TradeOffPoint(Record):
    """The plan for one budget: what it costs, the damage that it predicts, and the score if it was carried out."""

    budget: float
    cost: Cost
    damage: float | None = None
    score: float | None = None


class TradeOff(Record):
    """Plans for several budgets of one kind (``params``, ``macs`` or ``latency``), the smallest first.

    ``damage`` tells in words what the predicted damage is. Budgets that no plan can meet are in ``unreachable``.
    """

    version: int = SENSITIVITY_VERSION
    model: str
    budget: str
    rule: dict[str, Any] = {}
    damage: str = ""
    before: Cost
    baseline: float | None = None
    points: tuple[TradeOffPoint, ...]
    unreachable: tuple[float, ...] = ()
