"""What to do with each layer of a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import NonNegativeFloat, PositiveInt, model_validator

from tenfold.errors import PlanError, TenfoldError
from tenfold.files import read_text, write_text
from tenfold.records.base import Record
from tenfold.records.costs import Cost
from tenfold.records.recipe import Recipe
from tenfold.records.units import Unit

PLAN_VERSION = 2
PLAN_HEADER = """\
# A tenfold plan: what happens to each layer. Edit ranks or actions by hand and replay it with
# tenfold.apply(model, plan) or on the command line with --plan FILE. Ranks are numbers of kept components, by name.
# Fingerprints tell what was edited: leave them as they are.
"""


def check_version(what: str, values: Any) -> Any:
    """Return the values of a record that is to be validated; raise ValueError for another version, with the way out."""
    version = values.get("version", PLAN_VERSION) if isinstance(values, Mapping) else PLAN_VERSION
    if isinstance(version, int) and version != PLAN_VERSION:
        way_out = (
            "upgrade tenfold"
            if version > PLAN_VERSION
            else "make it again with this version, or read it with the tenfold that its field tenfold names"
        )
        msg = f"the {what} has version {version}, this tenfold reads {PLAN_VERSION}: {way_out}"
        raise ValueError(msg)
    return values


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
    distortion: float | None = None
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


class UnitPlan(Unit):
    """What happens to a unit: its sizes become ``size``, or stay where that is None, for the reason.

    The plan of the pivot says how that layer is refitted. The costs are those of all members together, and of what they
    compute outside of layers, such as attention scores; so are the milliseconds.
    """

    size: dict[str, PositiveInt] | None = None
    reason: str
    before: Cost
    after: Cost
    distortion: float | None = None
    latency_before_ms: NonNegativeFloat | None = None
    latency_after_ms: NonNegativeFloat | None = None

    @model_validator(mode="after")
    def _fits(self) -> UnitPlan:
        if self.size is not None and (
            set(self.size) != set(self.full) or any(self.size[name] > self.full[name] for name in self.size)
        ):
            msg = f"the unit {self.kind} of {self.pivot!r} has the sizes {self.full} at most, not {self.size}"
            raise ValueError(msg)
        return self

    @property
    def words(self) -> str:
        """What happens to it.

        Example:
            >>> cost = Cost()
            >>> full = {"width": 64}
            >>> UnitPlan(kind="mlp_width", path="", pivot="2", full=full, reason="", before=cost, after=cost).words
            'width 64'
        """
        return self.sized(self.size or self.full)

    @property
    def unit(self) -> Unit:
        """The unit itself."""
        return Unit(**{name: getattr(self, name) for name in Unit.model_fields})


class Plan(Record):
    """What happens to every layer of a model. An editable YAML file; ``apply`` carries it out.

    ``recipe`` is what was wanted. ``before`` and ``after`` are costs of the whole model as the planner computed them.
    ``fused`` are the paths of batch norms that are merged into a layer once all else is done, for inference, each with
    the path of that layer. ``unrolled`` are the paths of modules whose matrices are layers of the plan, which
    applying and loading take apart: recurrent networks with their kind, and modules whose parameters stack matrices,
    such as experts, with the names of these; ``.T`` marks matrices (in, out). Convolutions that pad first are put
    behind their padding, which is their kind. ``units`` are groups of layers that are narrowed together, or kept for a
    reason; the plan of a pivot says how it is refitted, those of its feeders that they stay, narrower.
    """

    version: int = PLAN_VERSION
    tenfold: str
    model: str
    recipe: Recipe = Recipe()
    before: Cost
    after: Cost
    layers: tuple[LayerPlan, ...]
    fused: dict[str, str] = {}
    unrolled: dict[str, str] = {}
    units: tuple[UnitPlan, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _check_version(cls, values: Any) -> Any:
        return check_version("plan", values)

    @model_validator(mode="after")
    def _check(self) -> Plan:
        paths = [layer.path for layer in self.layers]
        twice = {p for p in paths if paths.count(p) > 1} if len(set(paths)) < len(paths) else set()
        if twice:
            msg = f"layers appear twice: {', '.join(sorted(twice))}"
            raise ValueError(msg)
        self._check_units(set(paths))
        return self

    def _check_units(self, paths: set[str]) -> None:
        """Raise ValueError unless units that become smaller have their layers in the plan, and share none."""
        taken: set[str] = set()
        for unit in self.narrowed:
            for path in unit.members:
                if path not in paths:
                    msg = f"the unit {unit.kind} of {unit.pivot!r} has a layer {path!r} that is not in the plan"
                    raise ValueError(msg)
                if path in taken:
                    msg = f"layer {path!r} is in two units that become smaller: keep one of them"
                    raise ValueError(msg)
                taken.add(path)

    @property
    def seed(self) -> int:
        """Of everything that draws random numbers."""
        return self.recipe.seed

    @property
    def narrowed(self) -> tuple[UnitPlan, ...]:
        """The units that become smaller."""
        return tuple(unit for unit in self.units if unit.size is not None)

    @property
    def narrowed_paths(self) -> frozenset[str]:
        """The paths of the layers of units that become smaller."""
        return frozenset(path for unit in self.narrowed for path in unit.members)

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
            return cls.from_text(read_text(path, "the plan"), source=str(path))
        except TenfoldError as error:
            raise PlanError(str(error)) from error
