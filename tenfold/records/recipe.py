"""What is wanted of a compression: the one place where its choices are spelled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from tenfold.errors import BudgetError, RecipeError, TenfoldError
from tenfold.files import read_text, write_text
from tenfold.records.base import Names, Patterns, Record, Seed, explain, refusal
from tenfold.records.budget import Budget
from tenfold.records.families import expanded

DEFAULT_FORMATS = ("tucker2", "low_rank", "spatial", "cp3")
RECIPE_HEADER = "# A tenfold recipe: what is wanted of a compression. Use it with tenfold compress --recipe FILE.\n"

Method = Literal["sequential", "independent", "batchnorm", "none"]
Loss = Literal["outputs", "fisher"]
Weighing = Literal["gradients", "divergence"]


class Calibration(Record):
    """What unlabeled data are used for, and how much is read from them.

    Use it in a ``Recipe`` where the defaults take too long or too much memory, or where batch norms alone are to be
    re-estimated.

    Attributes:
        method: ``sequential`` plans by what the network's output loses and fits each layer, in closed form, to the
            original's output given what the compressed layers before it put out. ``independent`` makes the same plan
            and fits each layer on its own. ``batchnorm`` only re-estimates the statistics of batch norms. ``none``
            ignores the data.
        positions: output positions of a convolution that are read from each map and batch; None for all.
        draws: random projections of the outputs for each batch, from which output Gram matrices are estimated.
        loss: what errors of layers cost. ``outputs``: the squared error of the network's outputs, whatever they are.
            ``fisher``: the divergence of its predictions, for outputs that are scores of classes or words, such as
            those of a language model: a shift of all scores costs nothing, and one of an unlikely word next to
            nothing. A head of very many words has to run for it.
        max_width: statistics of more inputs or outputs than this are sketched; None for 8,192 inputs and 1,024 outputs.
        metric: what tells how much errors of a layer matter. ``gradients`` of the outputs, of all layers in one
            backward pass. ``divergence``: what the outputs change by where only this layer is reduced, by a tenth, as
            measured in a forward for each layer (LEMS 2026, lems-svd.github.io).
        judged: samples on which divergences are measured, at most a quarter; nothing is fitted to these before.
        clip: gradients at the positions of a sample, such as tokens, are scaled so that their norms are at most so many
            times their mean, and at least the mean divided by that; None for gradients as they are.
        refine: gradient steps, without labels, on each repeated block of the compressed model (layers of a
            transformer, residual blocks), towards what it puts out in the original; 0 for closed forms alone.
        held_out: share of the samples that are neither planned with nor fitted to, on which the agreement of result and
            original is measured; with 0 it is measured on all, which flatters it. None for 100 samples, but at least
            a fifth and at most a third.
    """

    method: Method = "sequential"
    positions: PositiveInt | None = 64
    draws: PositiveInt = 1
    loss: Loss = "outputs"
    max_width: PositiveInt | None = None
    metric: Weighing = "gradients"
    judged: PositiveInt = 64
    clip: float | None = Field(default=None, ge=1)
    refine: NonNegativeInt = 0
    held_out: float | None = Field(default=None, ge=0, le=0.8)

    @model_serializer(mode="wrap")
    def _with_positions(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {**dump(self), "positions": self.positions}  # files leave out what is None, which here is no default

    def held_out_of(self, samples: int) -> float:
        """Return the share of so many samples that is held out.

        A share of decisions is known to five points from 100 samples, to seven from 50.

        Example:
            >>> [Calibration().held_out_of(samples) for samples in (400, 2000)]
            [0.25, 0.2]
        """
        if self.held_out is not None:
            return float(self.held_out)
        return min(max(1 / 5, 100 / samples), 1 / 3)

    def judged_of(self, samples: int) -> float:
        """Return the share of so many samples on which divergences are measured; 0 by another metric."""
        return min(self.judged / samples, 1 / 4) if self.measures else 0.0

    @property
    def measures(self) -> bool:
        """Whether divergences are measured."""
        return self.plans and self.metric == "divergence"

    @property
    def plans(self) -> bool:
        """Whether the data decide ranks and factors, and not batch norms alone."""
        return self.method in {"sequential", "independent"}

    @model_validator(mode="after")
    def _check(self) -> Calibration:
        asked = {"metric: divergence": self.metric == "divergence", "refine": self.refine > 0}
        for name in (name for name, given in asked.items() if given and not self.plans):
            msg = f"{name} needs data to fit to: method: sequential or independent, not {self.method}"
            raise ValueError(msg)
        return self


class Recipe(Record):
    """What is wanted of a compression. Frozen, free of torch, YAML both ways; a saved model holds its own.

    Use one to say in a file what ``compress`` and ``tenfold compress`` are to do. How it is done - workers, clock,
    progress - is a ``Runtime``, on which the result does not depend.

    Attributes:
        budget: what the whole model may cost; see ``Budget``. Text such as ``"macs=0.5"`` is read.
        budget_of: in place of a budget of the whole model, budgets of parts of it, by a path, glob or ``re:``
            expression of their layers: ``{"backbone.*": "macs=0.5"}``. Shares are those of the part; all other layers
            stay as they are. A layer belongs to the first part that means it.
        rule: how ranks are chosen: the name of a rank rule, with its settings: ``{"name": "evbmf", "weaken": 0.8}``.
        formats: what layers may turn into, the preferred first, as a list or with commas: ``"tucker2,low_rank"``.
            Families (tucker, cp, svd, tt, tr, btd) stand for their usual formats.
        algorithms: by format, the algorithm with its settings, instead of the format's default:
            ``{"tucker2": {"name": "hosvd"}}``.
        units: groups of layers that may be narrowed together, such as ``mlp_width``, with the rule ``global`` and data.
            None for all kinds that are meant for it; empty for none.
        keep: layers to leave alone, as paths, globs or ``re:`` expressions.
        keep_ends: leave a first and a last layer alone that cost next to nothing; by default unless the rule selects
            layers by name.
        calibration: what data are used for.
        fuse_batchnorm: merge batch norms into the layers before them once all else is done, for inference.
        runtime: what the model is to run in: the name of a target runtime, such as ``onnxruntime``. Layers and models
            are timed there, and ranks are those that it likes. None where it does not matter: then a latency is one in
            torch.
        gate: keep a layer as it is where the factorized one measures slower in the runtime. None for where there is a
            clock: with a runtime or a budget of latency.
        seed: of everything that draws random numbers.

    Example:
        >>> recipe = Recipe.of("macs=0.5")
        >>> recipe.budget, recipe.rule, Recipe.from_text(recipe.to_yaml()) == recipe
        (Budget(macs=0.5), {'name': 'global'}, True)
        >>> Recipe(rule="ratio", formats="low_rank").rule
        {'name': 'ratio'}
    """

    budget: Budget = Budget()
    budget_of: dict[str, Budget] = {}
    rule: dict[str, Any] = Field(default={"name": "global"})
    formats: Names = DEFAULT_FORMATS
    algorithms: dict[str, dict[str, Any]] = {}
    units: Names | None = None
    keep: Patterns = ()
    keep_ends: bool | None = None
    calibration: Calibration = Calibration()
    fuse_batchnorm: bool = False
    runtime: str | None = None
    gate: bool | None = None
    seed: Seed = 0

    @classmethod
    def of(cls, recipe: Recipe | Budget | Mapping[str, Any] | str | None) -> Self:
        """Return a recipe from one, from a mapping of its fields, or from a budget, also as text: ``"macs=0.5"``.

        Raises:
            RecipeError: a field that does not exist or a value that is not allowed; the message names it.
            BudgetError: a budget that cannot be read.
        """
        if isinstance(recipe, cls):
            return recipe
        if isinstance(recipe, str | int | float | Budget):
            return cls(budget=Budget.of(recipe))  # a number is refused with what to write
        if recipe is not None and not isinstance(recipe, Mapping):
            msg = (
                f"a recipe is a Recipe, a budget such as 'macs=0.5', or a mapping of fields such as "
                f"{{'budget': 'macs=0.5'}}, not {recipe!r}. From a file it comes by Recipe.load(path)"
            )
            raise RecipeError(msg)
        limits = {name: value for name, value in (recipe or {}).items() if name in Budget.model_fields}
        if limits:
            msg = f"{', '.join(limits)} limits the budget and is no field of a recipe: write {{'budget': {limits}}}"
            raise RecipeError(msg)
        try:
            return cls.model_validate(dict(recipe or {}))
        except ValidationError as error:
            refused = refusal(error)
            if isinstance(refused, BudgetError):
                raise refused from error
            msg = f"invalid recipe: {explain(error)}"
            raise RecipeError(msg) from error

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a recipe from a YAML or JSON file.

        Raises:
            RecipeError: the file is missing or is no recipe.
        """
        path = Path(path)
        try:
            return cls.from_text(read_text(path, "the recipe"), source=str(path))
        except TenfoldError as error:
            raise RecipeError(str(error)) from error

    def save(self, path: str | Path) -> None:
        """Write the recipe to ``path`` as YAML, whole or not at all."""
        write_text(Path(path), self.to_yaml())

    def to_yaml(self) -> str:
        """Return the recipe as commented YAML."""
        return RECIPE_HEADER + super().to_yaml()

    @property
    def target(self) -> str:
        """The name of the runtime that the model is to run in."""
        return self.runtime or "torch"

    @property
    def timed(self) -> bool:
        """Whether the runtime has a say, so that it is measured what it likes."""
        return self.runtime is not None or "latency" in self.budget.limited or bool(self.gate)

    @property
    def gated(self) -> bool:
        """Whether layers that measure slower stay as they are."""
        return self.timed if self.gate is None else self.gate

    @property
    def rule_name(self) -> str:
        """The name of the rank rule."""
        return str(self.rule["name"])

    @field_validator("rule", mode="before")
    @classmethod
    def _read_rule(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("formats")
    @classmethod
    def _expand_families(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return expanded(value)

    @field_validator("algorithms", mode="before")
    @classmethod
    def _read_algorithms(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {format: {"name": own} if isinstance(own, str) else own for format, own in value.items()}

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if not isinstance(self.rule.get("name"), str):
            msg = "a rule needs its name, such as {name: evbmf, weaken: 0.8}"
            raise ValueError(msg)  # noqa: TRY004 - pydantic reports ValueError
        if self.budget and self.budget_of:
            msg = "budget limits the whole model and budget_of parts of it: give one of them"
            raise ValueError(msg)
        for pattern, own in self.budget_of.items():
            if not own or {"latency", "bytes"} & {*own.limited}:
                msg = f"a budget of a part, {pattern!r}, limits params or macs: "
                msg += "a time is one of the whole model, as bytes are"
                raise ValueError(msg)
        if not self.formats:
            msg = "formats is empty: name at least one, such as low_rank"
            raise ValueError(msg)
        return self
