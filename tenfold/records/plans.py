"""What to do with each layer of a model, and what came of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from tenfold.errors import BudgetError, PlanError, TenfoldError
from tenfold.records.base import Record
from tenfold.records.costs import Cost, Environment, Latency, Speedup
from tenfold.records.exports import ExportRecord
from tenfold.records.stages import StageRecord
from tenfold.records.store import write_text

PLAN_VERSION = 1
PLAN_HEADER = """\
# A tenfold plan: what happens to each layer. Edit ranks or actions by hand and replay it with
# tenfold.apply(model, plan) or on the command line with --plan FILE. Ranks are numbers of kept components, by name.
# Fingerprints tell what was edited: leave them as they are.
"""


class Budget(Record):
    """What the whole model may cost: a share of what it costs now (up to 1), or an absolute number (above 1).

    ``latency`` is measured: a share of the dense model's time in the memory format that is best for it, or above 1
    milliseconds of one forward.

    Example:
        >>> Budget.parse("macs=0.5,params=0.4")
        Budget(params=0.4, macs=0.5)
    """

    params: float | None = Field(default=None, gt=0)
    macs: float | None = Field(default=None, gt=0)
    latency: float | None = Field(default=None, gt=0)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``"macs=0.5,params=0.4"``.

        Raises:
            BudgetError: not of that form, an unknown name, or a number that is not positive.
        """
        values: dict[str, float] = {}
        for part in filter(None, (p.strip() for p in text.split(","))):
            name, equals, number = part.partition("=")
            twice = name.strip() in values
            try:
                values[name.strip()] = float(number)
            except ValueError:
                equals = ""
            if not equals or twice:
                msg = f"cannot read the budget {text!r}: write it as macs=0.5,params=0.4, each name once"
                raise BudgetError(msg)
        return cls.of(values)

    @classmethod
    def of(cls, budget: Budget | dict[str, float] | None) -> Self:
        """Return a budget from a mapping such as ``{"macs": 0.5}``.

        Raises:
            BudgetError: an unknown name, or a number that is not positive and finite.
        """
        if isinstance(budget, cls):
            return budget
        values = dict(budget or {})
        unknown = set(values) - set(cls.model_fields)
        if unknown:
            msg = f"a budget names {' or '.join(cls.model_fields)}, not {', '.join(sorted(unknown))}"
            raise BudgetError(msg)
        bad = {k: v for k, v in values.items() if v is not None and not _positive(v)}
        if bad:
            msg = f"a budget must be a positive number, not {bad}: a share of the model up to 1, or an absolute above 1"
            raise BudgetError(msg)
        return cls(**values)

    def allowance(self, cost: Cost, latency_ms: float | None = None) -> dict[str, float]:
        """Return the absolute limits, by name, for a model that costs ``cost`` and takes ``latency_ms`` now.

        Raises:
            BudgetError: a share of the latency is asked for and no latency was measured.

        Example:
            >>> Budget(macs=0.5, latency=0.5).allowance(Cost(macs=100), latency_ms=8.0)
            {'macs': 50.0, 'latency': 4.0}
        """
        limits = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if value is None:
                continue
            whole = latency_ms if name == "latency" else getattr(cost, name)
            if whole is None and value <= 1:
                msg = f"latency={value} is a share of a latency that was not measured: pass a clock, or milliseconds"
                raise BudgetError(msg)
            limits[name] = value * whole if value <= 1 else value
        return limits

    def __bool__(self) -> bool:
        return any(getattr(self, name) is not None for name in type(self).model_fields)

    def __repr_args__(self) -> list[tuple[str | None, Any]]:
        return [(k, v) for k, v in self if v is not None]


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


class LayerPlan(Record):
    """What happens to one layer: factorize it, or keep it for a reason.

    ``rel_error`` is ‖W − Ŵ‖/‖W‖; None until the layer was decomposed. The latencies are those of the dense layer and
    of the factorized one, measured in turns, for all calls of one forward; None where nobody measured. The
    ``fingerprint`` is that of the decision (action, format, rank, algorithm) of which all this was said: a layer whose
    decision has another one was edited since. Left out, it is that of the decision.
    """

    path: str
    aliases: tuple[str, ...] = ()
    kind: str
    action: Literal["factorize", "keep"]
    format: str | None = None
    rank: dict[str, PositiveInt] | None = None
    algorithm: dict[str, Any] | None = None
    reason: str
    before: Cost
    after: Cost
    rel_error: NonNegativeFloat | None = None
    damage: float | None = None
    latency_before_ms: NonNegativeFloat | None = None
    latency_after_ms: NonNegativeFloat | None = None
    fingerprint: str | None = None

    @property
    def edited(self) -> bool:
        """Whether the decision is another one than that of which the reason and the figures were said."""
        return self.fingerprint != self._decision()

    def _decision(self) -> str:
        """Return the fingerprint of the decision as it is now."""
        decision = [self.action, self.format, self.rank, self.algorithm]
        text = json.dumps(decision, sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()

    @model_validator(mode="after")
    def _complete(self) -> LayerPlan:
        if self.fingerprint is None:
            object.__setattr__(self, "fingerprint", self._decision())  # a record is frozen
        if self.action == "factorize" and (self.format is None or not self.rank):
            msg = f"layer {self.path!r} is to be factorized but has no format or no rank"
            raise ValueError(msg)
        return self


class Plan(Record):
    """What happens to every layer of a model. An editable YAML file; ``apply`` carries it out.

    ``before`` and ``after`` are costs of the whole model as the planner computed them. ``folded`` are the paths of
    batch norms that are merged into a layer once all else is done, for inference, each with the path of that layer.
    ``opened`` are the paths of recurrent networks whose matrices are layers of the plan, each with its kind; applying
    and loading open them.
    """

    version: int = PLAN_VERSION
    tenfold: str
    model: str
    seed: int = 0
    rule: dict[str, Any] = {}
    budget: dict[str, float] = {}
    before: Cost
    after: Cost
    layers: tuple[LayerPlan, ...]
    folded: dict[str, str] = {}
    opened: dict[str, str] = {}

    @model_validator(mode="after")
    def _check(self) -> Plan:
        if self.version > PLAN_VERSION:
            msg = f"the plan has version {self.version}, this tenfold reads up to {PLAN_VERSION}: upgrade tenfold"
            raise ValueError(msg)
        paths = [layer.path for layer in self.layers]
        twice = {p for p in paths if paths.count(p) > 1} if len(set(paths)) < len(paths) else set()
        if twice:
            msg = f"layers appear twice: {', '.join(sorted(twice))}"
            raise ValueError(msg)
        return self

    @property
    def factorized(self) -> tuple[LayerPlan, ...]:
        """The layers that are to be factorized."""
        return tuple(layer for layer in self.layers if layer.action == "factorize")

    def layer(self, path: str) -> LayerPlan:
        """Return the plan of the layer at ``path``; raises KeyError when there is none."""
        for layer in self.layers:
            if path == layer.path or path in layer.aliases:
                return layer
        raise KeyError(path)

    def to_yaml(self) -> str:
        """Return the plan as commented YAML."""
        return PLAN_HEADER + super().to_yaml()

    def save(self, path: str | Path) -> None:
        """Write the plan to ``path`` as YAML, whole or not at all."""
        write_text(Path(path), self.to_yaml())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a plan from a YAML or JSON file.

        Raises:
            PlanError: the file is missing, is not a plan, or was written by a newer version.
        """
        path = Path(path)
        if not path.is_file():
            msg = f"there is no plan at {path}"
            raise PlanError(msg)
        try:
            return cls.from_text(path.read_text(encoding="utf-8"), source=str(path))
        except (TenfoldError, UnicodeDecodeError) as error:
            raise PlanError(str(error)) from error


class Measurement(Record):
    """A model as measured: cost, latency and score (a fraction; None when it was not evaluated)."""

    params: int
    macs: int
    bytes: int | None = None
    latency_ms: float | None = None
    latency: Latency | None = None
    score: float | None = None


class RunRecord(Record):
    """The outcome of a compression run: everything that a report shows, without any weights."""

    version: int = PLAN_VERSION
    task: str | None = None
    command: str | None = None
    seed: int = 0
    before: Measurement
    after: Measurement
    speedup: Speedup | None = None
    scores: dict[str, float] = {}
    plan: Plan
    tuning: tuple[dict[str, Any], ...] = ()
    stages: tuple[StageRecord, ...] = ()
    seconds: dict[str, float] = {}
    settings: dict[str, Any] = {}
    exports: tuple[ExportRecord, ...] = ()
    environment: Environment
