"""What every layer of a plan could have become: enough to plan anew without the model, in a moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError, model_validator

from tenfold.errors import DataError
from tenfold.records.base import Record, explain
from tenfold.records.costs import Cost
from tenfold.records.plans import Plan
from tenfold.records.store import write_text

CANDIDATES_VERSION = 1


class Merged(Record):
    """What a plan makes of an option: a rank made full where the layer then runs a stage less, and costs less.

    ``option`` is the number of the option, ``note`` what the plan adds to its reason.
    """

    option: NonNegativeInt
    rank: dict[str, PositiveInt]
    cost: Cost
    damage: float | None = None
    latency_ms: NonNegativeFloat | None = None
    note: str


class Options(Record):
    """The ranks of one format that are worth a choice for a layer, as columns: one entry of each for each option.

    Left out is only what another option of the format beats on damage and on all costs, or on any of them alone.
    ``latency_ms`` is empty where there was no clock.
    """

    format: str
    names: tuple[str, ...]
    ranks: tuple[tuple[PositiveInt, ...], ...]
    params: tuple[NonNegativeInt, ...]
    macs: tuple[NonNegativeInt, ...]
    damage: tuple[float, ...]
    latency_ms: tuple[NonNegativeFloat, ...] = ()
    merged: tuple[Merged, ...] = ()

    @model_validator(mode="after")
    def _columns(self) -> Options:
        sizes = {len(self.ranks), len(self.params), len(self.macs), len(self.damage)}
        sizes |= {len(self.latency_ms)} if self.latency_ms else set()
        if len(sizes) > 1 or any(len(rank) != len(self.names) for rank in self.ranks):
            msg = f"the options of {self.format} have columns of {sorted(sizes)} entries: all must be of one length"
            raise ValueError(msg)
        if any(merged.option >= len(self.ranks) for merged in self.merged):
            msg = f"{self.format} has {len(self.ranks)} options: one that is merged is not among them"
            raise ValueError(msg)
        return self

    def __len__(self) -> int:
        return len(self.ranks)

    def rank(self, option: int) -> dict[str, int]:
        """Return the ranks of an option by name."""
        return dict(zip(self.names, self.ranks[option], strict=True))


class LayerCandidates(Record):
    """One layer that a plan had a choice for: its options by format, in the order in which the plan weighs them.

    ``format`` and ``rank`` are those that it has as it is, where it is factorized already; ``latency_ms`` is what it
    takes then, as the clock says, None without a clock.
    """

    path: str
    format: str | None = None
    rank: dict[str, PositiveInt] | None = None
    latency_ms: NonNegativeFloat | None = None
    options: tuple[Options, ...] = ()

    def of(self, format: str) -> Options:
        """Return the options of a format; raises KeyError where it serves the layer at no rank."""
        for options in self.options:
            if options.format == format:
                return options
        raise KeyError(format)


class ForwardTime(Record):
    """What a budget of latency is reckoned with, in milliseconds; see ``tenfold.planning.Timing``.

    ``dense_ms`` is one forward of the model as it is, in its best memory format; ``whole_ms`` the same by the clock
    that times layers, of which ``best_share`` is the time in that best format. ``tighten`` is what earlier plans that
    were measured as a whole taught.
    """

    dense_ms: PositiveFloat
    whole_ms: PositiveFloat
    best_share: PositiveFloat = 1.0
    tighten: PositiveFloat = 1.0
    batch_size: int | None = None

    def allowed(self, share: float) -> float:
        """Return the milliseconds, by the clock, of a forward in a share of the time.

        Example:
            >>> ForwardTime(dense_ms=10.0, whole_ms=8.0).allowed(0.5)
            4.0
        """
        return share * self.best_share * self.tighten * self.whole_ms

    def share(self, clock_ms: float) -> float:
        """Return what share of the model's time a forward is expected to take that is ``clock_ms`` by the clock."""
        return clock_ms / self.allowed(1.0)


class Candidates(Record):
    """What a plan chose from. Lies as ``candidates.json`` beside a record, and may be missing.

    Attributes:
        plan: that was made; layers that are not in ``layers`` are as it says.
        damage: tells in words what the predicted damage is.
        algorithms: with their settings, by format.
        layers: those that there was a choice for, in the order of the plan.
        time: for budgets of latency; None without a clock.
    """

    version: int = CANDIDATES_VERSION
    tenfold: str
    plan: Plan
    damage: str = ""
    algorithms: dict[str, dict[str, Any]] = {}
    layers: tuple[LayerCandidates, ...]
    time: ForwardTime | None = None

    @model_validator(mode="after")
    def _check(self) -> Candidates:
        if self.version > CANDIDATES_VERSION:
            msg = f"it has version {self.version}, this tenfold reads up to {CANDIDATES_VERSION}: upgrade tenfold"
            raise ValueError(msg)
        known = {layer.path for layer in self.plan.layers}
        strange = [layer.path for layer in self.layers if layer.path not in known]
        if strange:
            msg = f"layer {strange[0]!r} has candidates and is not in the plan"
            raise ValueError(msg)
        timed = [layer for layer in self.layers if layer.latency_ms is not None]
        if len(timed) != (0 if self.time is None else len(self.layers)):
            msg = "either all layers have milliseconds, and the whole forward as well, or none has"
            raise ValueError(msg)
        return self

    def save(self, path: str | Path) -> None:
        """Write the candidates to ``path`` as JSON, whole or not at all."""
        write_text(Path(path), self.model_dump_json(exclude_defaults=True))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read candidates from a JSON file.

        Raises:
            DataError: the file cannot be read, is something else, or was written by a newer version.
        """
        path = Path(path)
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            msg = f"cannot read the candidates {path}: {error.strerror or error}"
            raise DataError(msg) from error
        except ValidationError as error:
            msg = f"{path} does not hold the candidates of a plan: {explain(error)}"
            raise DataError(msg) from error
