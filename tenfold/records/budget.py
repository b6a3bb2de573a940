"""What the whole model may cost, as shares of what it costs now or as absolute limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from tenfold.errors import BudgetError, RecipeError
from tenfold.records.base import Record, explain, refusal
from tenfold.records.costs import Cost
from tenfold.records.sizes import parse_size
from tenfold.registry import did_you_mean

LIMITED = {"params": "max_params", "macs": "max_macs", "bytes": "max_bytes", "latency": "max_latency_ms"}


class Budget(Record):
    """What the whole model may cost: shares of what it costs now, absolute limits, or both, where the smaller holds.

    Use it where limits are computed; a text such as ``"macs=0.5"`` does the same.

    Attributes:
        params: share of the parameters that may stay, in (0, 1].
        macs: share of the multiply-accumulates of one forward, in (0, 1].
        bytes: share of the bytes of all parameters and buffers, each in its dtype, in (0, 1].
        latency: share of the measured time of the model in the memory format that is best for it, in (0, 1].
        max_params: number of parameters.
        max_macs: number of multiply-accumulates.
        max_bytes: number of bytes, or such as ``"20MB"``.
        max_latency_ms: milliseconds of one forward.

    Example:
        >>> Budget.parse("macs=0.5,max_params=40000")
        Budget(macs=0.5, max_params=40000.0)
    """

    params: float | None = Field(default=None, gt=0, le=1)
    macs: float | None = Field(default=None, gt=0, le=1)
    bytes: float | None = Field(default=None, gt=0, le=1)
    latency: float | None = Field(default=None, gt=0, le=1)
    max_params: float | None = Field(default=None, gt=0)
    max_macs: float | None = Field(default=None, gt=0)
    max_bytes: float | None = Field(default=None, gt=0)
    max_latency_ms: float | None = Field(default=None, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        """Read text, and refuse names and numbers that are not allowed, each in words of its own."""
        if isinstance(value, cls):
            return value
        values = _split(value) if isinstance(value, str) else value
        if values is not None and not isinstance(values, Mapping):
            raise BudgetError(_unnamed(values))
        values = dict(values or {})
        if isinstance(values.get("max_bytes"), str):
            values["max_bytes"] = _size(values["max_bytes"])
        for name, number in values.items():
            if name not in cls.model_fields:
                known = cls.model_fields
                msg = f"a budget does not name {name}. {did_you_mean(str(name).lower(), known)}"
                raise BudgetError(msg)
            if number is not None:
                _check(name, number)
        return values

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``"macs=0.5,max_params=40000"``.

        Raises:
            BudgetError: not of that form, an unknown name, or a number that is not allowed.
        """
        return cls.of(text)

    @classmethod
    def of(cls, budget: Budget | Mapping[str, float] | str | None) -> Self:
        """Return a budget from a mapping such as ``{"macs": 0.5}`` or text such as ``"macs=0.5"``.

        Raises:
            BudgetError: an unknown name, or a number that is not allowed.
        """
        try:
            return cls.model_validate(budget)
        except ValidationError as error:
            raise refusal(error) or BudgetError(explain(error)) from error

    @classmethod
    def at_most(cls, limits: Mapping[str, float]) -> Self:
        """Return the budget of absolute limits, and of a share of the ``latency``."""
        return cls(**{k if k == "latency" else LIMITED[k]: v for k, v in limits.items()})

    @property
    def given(self) -> dict[str, float]:
        """What is limited, by the name of the field, without what is not."""
        return {name: value for name, value in self if value is not None}

    @property
    def limited(self) -> tuple[str, ...]:
        """Which of ``params``, ``macs``, ``bytes`` and ``latency`` are limited."""
        return tuple(
            k for k, most in LIMITED.items() if getattr(self, k) is not None or getattr(self, most) is not None
        )

    def of_cost(self) -> Self:
        """Return the budget of parameters and multiply-accumulates."""
        return self.replace(latency=None, max_latency_ms=None, bytes=None, max_bytes=None)

    def allowance(self, cost: Cost, latency_ms: float | None = None, size: int | None = None) -> dict[str, float]:
        """Return the absolute limits, by name, for a model of so many bytes that costs ``cost`` and takes that time.

        Raises:
            BudgetError: a share is asked for of a latency that was not measured, or of bytes that nobody counted.

        Example:
            >>> Budget(macs=0.5, max_latency_ms=3.0).allowance(Cost(macs=100), latency_ms=8.0)
            {'macs': 50.0, 'latency': 3.0}
        """
        limits: dict[str, float] = {}
        for name in self.limited:
            share, most = getattr(self, name), getattr(self, LIMITED[name])
            whole = latency_ms if name == "latency" else size if name == "bytes" else getattr(cost, name)
            if share is not None and whole is None:
                unknown = (
                    "a latency that was not measured: pass a clock"
                    if name == "latency"
                    else "bytes that were not counted: make the plan from the model"
                )
                msg = f"{name}={share:g} is a share of {unknown}, or {LIMITED[name]}"
                raise BudgetError(msg)
            limits[name] = min(
                *(v for v in (None if share is None else share * whole, most) if v is not None), float("inf")
            )
        return limits

    def __bool__(self) -> bool:
        return bool(self.given)

    def __str__(self) -> str:
        return ",".join(f"{name}={value:g}" for name, value in self.given.items())

    def __repr_args__(self) -> list[tuple[str | None, Any]]:
        return list(self.given.items())


def _split(text: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, number = (piece.strip() for piece in part.partition("="))
        read = _number(number)
        if not equals and _number(part) is not None:
            raise BudgetError(_unnamed(part))
        if name == "max_bytes" and name not in values:
            values[name] = number
            continue
        if read is None or name in values:
            hint = ". For a recipe in a file: Recipe.load(path)" if text.endswith((".yaml", ".yml", ".json")) else ""
            msg = f"cannot read the budget {text!r}: write it as macs=0.5,params=0.4, each name once{hint}"
            raise BudgetError(msg)
        values[name] = number if number.endswith("%") else read
    return values


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except RecipeError as error:
        msg = f"the budget max_bytes={text!r}: {error}"
        raise BudgetError(msg) from error


def _number(text: str) -> float | None:
    """Return the number that a text is, of percent or not; None for another text."""
    try:
        return float(text.removesuffix("%"))
    except ValueError:
        return None


def _unnamed(value: object) -> str:
    """Return what to write instead of a budget that is a number alone."""
    number = _number(str(value))
    if number is None or not 0 < number < float("inf"):
        return f"a budget names what it limits, such as macs=0.5 or max_latency_ms=4, not {value!r}"
    percent = str(value).strip().endswith("%") or 1 < number <= 100
    share = f"{number / 100 if percent else number:g}"
    if not percent and number > 1:
        return f"the budget {value!r} does not say of what: write max_params={number:.12g} or max_macs={number:.12g}"
    return f"the budget {value!r} does not say of what: write macs={share}, params={share} or latency={share}"


def _check(name: str, value: object) -> None:
    """Raise BudgetError unless ``value`` is allowed for the field ``name``."""
    if isinstance(value, str) and (read := _number(value)) is not None and read > 0:
        share = {most: kind for kind, most in LIMITED.items()}.get(name, name)
        right = f"{share}={read / 100:g}" if value.endswith("%") else f"{name}={read:g}, without quotes"
        msg = f"the budget {name}={value!r} is written {right}"
        raise BudgetError(msg)
    number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
    if not number:
        msg = f"the budget {name}={value!r} must be a positive number"
        raise BudgetError(msg)
    if name in LIMITED and value > 1:  # type: ignore[operator]
        limit = f"{LIMITED[name]}={value:g}"
        percent = f", for {value:g} % write {name}={value / 100:g}" if 2 <= value <= 100 else ""  # type: ignore[operator]
        msg = (
            f"the budget {name}={value:g} is a share of the model, up to 1{percent}. "
            f"For an absolute limit write {limit}"
        )
        raise BudgetError(msg)
