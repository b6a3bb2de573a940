"""What each layer of a model could become, at what cost, time and distortion: the table that plans are chosen from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    ConfigDict,
    NonNegativeFloat,
    NonNegativeInt,
    PlainSerializer,
    PlainValidator,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from tenfold.errors import DataError
from tenfold.files import write_text
from tenfold.records.base import Record
from tenfold.records.costs import Cost
from tenfold.records.introduced import Introduced
from tenfold.records.parsing import seal
from tenfold.records.recipe import Recipe
from tenfold.records.units import Unit

OPTIONS_VERSION = 2


def _ints(value: Any) -> Any:
    return _array(value, np.int64)


def _floats(value: Any) -> Any:
    return _array([np.nan if x is None else x for x in value] if isinstance(value, list) else value, np.float64)


def _array(value: Any, dtype: Any) -> Any:
    try:
        return np.asarray(value, dtype=dtype)
    except (TypeError, OverflowError) as error:  # pydantic reports ValueError alone
        raise ValueError(str(error)) from error


Ints = Annotated[NDArray[np.int64], PlainValidator(_ints), PlainSerializer(lambda a: a.tolist())]
Floats = Annotated[
    NDArray[np.float64],
    PlainValidator(_floats),
    PlainSerializer(lambda a: [None if np.isnan(x) else x for x in a.tolist()]),
]


class _Columns(Record):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class FormatOptions(_Columns):
    """The ranks at which a layer could take one format, as columns: one entry of each for each option.

    Attributes:
        format: name of the format.
        names: of its ranks.
        ranks: (n, names), coarsest first along the rows of a rule with one threshold.
        params: (n,) parameters of the layer at each option.
        macs: (n,) multiply-accumulates of one forward.
        latency_ms: (n,) milliseconds of one forward; None without a clock.
        columns: further numbers (n,) that rules compare, by name: ``distortion``, ``rel_error`` ... Not a number where
            nothing was measured.
        fuller: options that no rule selects, but that plans take instead of others: they cost less and hold more.
        becomes: by option, the one of ``fuller`` that is taken instead.
        notes: what a plan adds to its reason, by option.
    """

    format: str
    names: tuple[str, ...]
    ranks: Ints
    params: Ints
    macs: Ints
    latency_ms: Floats | None = None
    columns: dict[str, Floats] = {}
    fuller: FormatOptions | None = None
    becomes: dict[int, int] = {}
    notes: dict[int, str] = {}

    @model_validator(mode="after")
    def _same_length(self) -> FormatOptions:
        columns = [self.params, self.macs, *self.columns.values()]
        columns += [] if self.latency_ms is None else [self.latency_ms]
        sizes = {len(self), *(len(column) for column in columns)}
        if len(sizes) > 1 or self.ranks.ndim != 2 or self.ranks.shape[1] != len(self.names):
            msg = f"the options of {self.format} have columns of {sorted(sizes)} entries: all must be of one length"
            raise ValueError(msg)
        if len(self) and self.ranks.min() < 1:
            msg = f"the options of {self.format} have ranks below 1"
            raise ValueError(msg)
        if any(not 0 <= to < (0 if self.fuller is None else len(self.fuller)) for to in self.becomes.values()):
            msg = f"options of {self.format} become others that are not there"
            raise ValueError(msg)
        return self

    def __len__(self) -> int:
        return len(self.ranks)

    def __repr_args__(self) -> list[tuple[str | None, Any]]:
        return [("format", self.format), ("options", len(self)), ("columns", [*self.columns])]

    def rank(self, option: int) -> dict[str, int]:
        """Return the ranks of an option by name."""
        return dict(zip(self.names, self.ranks[option].tolist(), strict=True))

    def cost(self, option: int) -> Cost:
        """Return what the layer costs as this option."""
        return Cost(params=int(self.params[option]), macs=int(self.macs[option]))

    def taken(self, option: int) -> tuple[FormatOptions, int]:
        """Return the option that a plan takes for this one: itself, or a fuller one that is no slower either."""
        if option not in self.becomes or self.fuller is None:
            return self, option
        other = self.becomes[option]
        now, then = self.latency_ms, self.fuller.latency_ms
        slower = now is not None and then is not None and then[other] > now[option]
        return (self, option) if slower else (self.fuller, other)

    def only(self, rows: Any) -> FormatOptions:
        """Return some of the options."""
        kept = np.arange(len(self))[rows]
        return FormatOptions(
            format=self.format,
            names=self.names,
            ranks=self.ranks[kept],
            params=self.params[kept],
            macs=self.macs[kept],
            latency_ms=None if self.latency_ms is None else self.latency_ms[kept],
            columns={name: column[kept] for name, column in self.columns.items()},
            fuller=self.fuller,
            becomes={new: self.becomes[old] for new, old in enumerate(kept.tolist()) if old in self.becomes},
            notes={new: self.notes[old] for new, old in enumerate(kept.tolist()) if old in self.notes},
        )


class LayerOptions(_Columns):
    """One layer of the model: what it is now, and its options by format, the preferred first.

    Attributes:
        path: dotted module name.
        aliases: further paths of the same module.
        kind: the layer in words.
        before: what it costs as it is.
        itemsize: bytes of a parameter.
        format, rank: those that it has as it is, where it is factorized already.
        latency_ms: what it takes as it is; None without a clock.
        keep_reason: why it has no options; None where there is a choice.
        options: by format.
    """

    path: str
    aliases: tuple[str, ...] = ()
    kind: str = ""
    before: Cost
    itemsize: PositiveInt = 4
    format: str | None = None
    rank: dict[str, PositiveInt] | None = None
    latency_ms: NonNegativeFloat | None = None
    keep_reason: str | None = None
    options: tuple[FormatOptions, ...] = ()

    def column(self, name: str) -> NDArray[np.float64]:
        """Return a column over all rows (1 + n,): first the layer as it is, then its options in order.

        ``bytes`` are those of the parameters, and of buffers that an option adds.
        """
        now: float | None
        parts: list[Any]
        if name == "latency":
            now, parts = self.latency_ms, [options.latency_ms for options in self.options]
            if now is None or any(part is None for part in parts):
                msg = f"there is no latency of layer {self.path!r}"
                raise DataError(msg)
        elif name in {"params", "macs"}:
            now, parts = getattr(self.before, name), [getattr(options, name) for options in self.options]
        elif name == "bytes":
            now = self.itemsize * self.before.params
            parts = [self.itemsize * own.params + own.columns.get("buffer_bytes", 0) for own in self.options]
        else:
            now, parts = 0.0, [options.columns[name] for options in self.options]
        return np.concatenate([np.array([now], dtype=np.float64), *parts])

    def place(self, row: int) -> tuple[FormatOptions, int]:
        """Return the format and the number of the option in a row of ``column``, from 1 on."""
        option = row - 1
        for options in self.options:
            if option < len(options):
                return options, option
            option -= len(options)
        msg = f"layer {self.path!r} has no row {row}"
        raise IndexError(msg)

    def of(self, format: str) -> FormatOptions:
        """Return the options of a format; raises KeyError where it serves the layer at no rank."""
        for options in self.options:
            if options.format == format:
                return options
        raise KeyError(format)


class UnitOptions(_Columns):
    """One unit of the model, and the sizes that it could have. An option excludes those of its layers.

    Attributes:
        unit: its layers.
        before: what all members cost as they are, with what they compute outside of layers.
        latency_ms: what they take as they are; None without a clock.
        options: the sizes in place of ranks, costs of all members together and the distortion; the format is the kind
            of unit. None where the unit is kept.
        pivot: the format of the pivot, and its ranks (n, names), by option.
        algorithm: that finds the factors of the pivot.
        params: of each member by option (n,), by path.
        macs: the same of multiply-accumulates.
    """

    unit: Unit
    before: Cost = Cost()
    latency_ms: NonNegativeFloat | None = None
    options: FormatOptions | None = None
    pivot: FormatOptions | None = None
    algorithm: dict[str, Any] = {}
    params: dict[str, Ints] = {}
    macs: dict[str, Ints] = {}

    def kept(self, reason: str) -> UnitOptions:
        """Return the unit without options, with the reason."""
        unit = self.unit.replace(keep_reason=self.unit.keep_reason or reason)
        return self.replace(unit=unit, options=None, pivot=None, params={}, macs={})

    def only(self, rows: Any) -> UnitOptions:
        """Return some of the options; see ``kept`` for none at all."""
        if self.options is None or self.pivot is None:
            return self
        return self.replace(
            options=self.options.only(rows),
            pivot=self.pivot.only(rows),
            params={path: column[rows] for path, column in self.params.items()},
            macs={path: column[rows] for path, column in self.macs.items()},
        )

    def member_cost(self, path: str, option: int) -> Cost:
        """Return what a member costs as part of an option."""
        return Cost(params=int(self.params[path][option]), macs=int(self.macs[path][option]))


class ForwardTime(Record):
    """What a latency budget is converted with, in milliseconds; see ``tenfold.planning.Timing``.

    Attributes:
        dense_ms: one forward of the model as it is, in its best memory format.
        whole_ms: the same by the lookup table that times layers.
        best_share: the time in the best memory format as a share of that in the memory format of the lookup table.
        tighten: factor on the allowance, from earlier plans that were measured as a whole.
        batch_size: of the inputs.
    """

    dense_ms: PositiveFloat
    whole_ms: PositiveFloat
    best_share: PositiveFloat = 1.0
    tighten: PositiveFloat = 1.0
    batch_size: int | None = None

    def allowed(self, share: float) -> float:
        """Return the milliseconds, by the lookup table, of a forward in a share of the time.

        Example:
            >>> ForwardTime(dense_ms=10.0, whole_ms=8.0).allowed(0.5)
            4.0
        """
        return share * self.best_share * self.tighten * self.whole_ms

    def share(self, table_ms: float) -> float:
        """Return what share of the model's time a forward takes that is ``table_ms`` by the lookup table."""
        return table_ms / self.allowed(1.0)


class OptionTable(_Columns, Introduced):
    """What each layer could become. Measured once, by ``tenfold.tabulate``; plans are chosen from it in milliseconds.

    Use it to try budgets, rules and layers to keep without measuring again: ``choose`` makes a plan of it. It needs
    neither the model nor torch, and lies as ``options.json`` beside a saved model, where explorer and reports read it.

    Attributes:
        model: name of the class of the model.
        recipe: that the table was made for: its rows are those of the recipe's rule.
        before: cost of the whole model as it is.
        bytes: of all its parameters and buffers; None where nobody counted them.
        layers: every layer of the model, in order; those that are kept as they are with the reason.
        distortion: says in words what the column ``distortion`` measures.
        algorithms: with their settings, by format.
        unrolled: paths of modules whose matrices are layers of the table: see ``Plan``.
        time: for latency budgets; None without a clock.
        units: groups of layers that could be narrowed together; no two of those with options share a layer.
    """

    version: int = OPTIONS_VERSION
    tenfold: str
    model: str
    recipe: Recipe
    before: Cost
    bytes: NonNegativeInt | None = None
    layers: tuple[LayerOptions, ...]
    distortion: str = ""
    algorithms: dict[str, dict[str, Any]] = {}
    unrolled: dict[str, str] = {}
    time: ForwardTime | None = None
    units: tuple[UnitOptions, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> OptionTable:
        if self.version != OPTIONS_VERSION:
            older = "make the plan again with this version" if self.version < OPTIONS_VERSION else "upgrade tenfold"
            msg = f"it has version {self.version}, this tenfold reads {OPTIONS_VERSION}: {older}"
            raise ValueError(msg)
        timed = [layer for layer in self.eligible if layer.latency_ms is not None]
        if len(timed) != (0 if self.time is None else len(self.eligible)):
            msg = "either all layers have milliseconds, and the whole forward as well, or none has"
            raise ValueError(msg)
        return self

    @property
    def eligible(self) -> tuple[LayerOptions, ...]:
        """The layers that there is a choice for."""
        return tuple(layer for layer in self.layers if layer.keep_reason is None)

    def layer(self, path: str) -> LayerOptions:
        """Return the layer at ``path``; raises KeyError when there is none."""
        for layer in self.layers:
            if path == layer.path or path in layer.aliases:
                return layer
        raise KeyError(path)

    def kept(self, reasons: dict[str, str], *, instead_of: str | None = None) -> OptionTable:
        """Return the table with some layers kept as they are, by path, and units by key, each with a reason.

        What is kept already keeps its reason, unless that is the one to replace.
        """
        layers = (
            layer.replace(keep_reason=reasons[layer.path], options=())
            if layer.path in reasons and layer.keep_reason in (None, instead_of)
            else layer
            for layer in self.layers
        )
        units = (own.kept(reasons[own.unit.key]) if own.unit.key in reasons else own for own in self.units)
        return self.replace(layers=tuple(layers), units=tuple(units))

    def faster(self) -> OptionTable:
        """Return the table without options that take no less time than the layer as it is, by its latencies."""
        kept: dict[str, str] = {}
        layers = []
        for layer in self.layers:
            now = layer.latency_ms
            if layer.keep_reason is None and now:
                options = tuple(own.only(own.latency_ms < now) for own in layer.options if own.latency_ms is not None)
                options = tuple(own for own in options if len(own))
                if not options and layer.options:
                    kept[layer.path] = (
                        f"no rank of {' or '.join(self.recipe.formats)} is faster in {self.recipe.target}"
                    )
                layers.append(layer.replace(options=options))
            else:
                layers.append(layer)
        return self.replace(layers=tuple(layers)).kept(kept)

    def save(self, path: str | Path) -> None:
        """Write the table to ``path`` as JSON, whole or not at all."""
        write_text(Path(path), seal(self.model_dump_json(exclude_none=True)))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a table from a JSON file.

        Raises:
            DataError: the file cannot be read, is something else, or was written by another version.
        """
        return cls.from_json_file(path, "an option table")
