"""Learned ranks: the LC algorithm re-chooses the rank of each layer while the weights are trained to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from pydantic import PositiveFloat, field_validator
from torch import Tensor, nn

from tenfold.allocation import Override, choose
from tenfold.errors import BudgetError, PlanError
from tenfold.formats import FORMATS
from tenfold.formats.matrix import MatrixFormat
from tenfold.planning import tabulate
from tenfold.records import (
    Budget,
    LayerOptions,
    LayerPlan,
    Names,
    OptionTable,
    Patterns,
    Plan,
    Profile,
    Recipe,
    Record,
    Seed,
)
from tenfold.surgery import find
from tenfold.tracing.contexts import device_of
from tenfold.training.low_rank.admm import plugged
from tenfold.training.low_rank.projection import PlanProjection, Projection

NOT_WORTH_IT = "learned: what it would save is worth less than what it would lose"
CostName = Literal["params", "macs"]


class LcConfig(Record):
    """How to learn ranks: within a budget, or for a price.

    Attributes:
        budget: ``params`` or ``macs`` of the whole model, met by every choice of ranks.
        cost_weight: λ, the price of the whole model's cost in units of the loss, instead of a budget. It is weighed
            against the scheduled strength of the penalty: ``AdmmConfig.last_rho`` and λ decide where ranks end.
        cost: the cost that λ is the price of.
        formats: products of two matrices: ``low_rank`` (scheme 1 of the paper), ``spatial`` (scheme 2). Each layer
            takes the better one.
        keep: layers to leave alone, as paths, globs or ``re:`` expressions.
        keep_ends: leave a first and a last layer alone that cost next to nothing.
        seed: of every algorithm that draws random numbers.
    """

    budget: Budget = Budget()
    cost_weight: PositiveFloat | None = None
    cost: CostName = "macs"
    formats: Names = ("low_rank",)
    keep: Patterns = ()
    keep_ends: bool = True
    seed: Seed = 0

    @field_validator("budget", mode="before")
    @classmethod
    def _read_budget(cls, value: Any) -> Any:
        return value if isinstance(value, Budget) else Budget.of(value)


class LearnedRanks(Projection):
    """The projection of the LC algorithm: onto weights whose format and rank are the best for a price or a budget.

    A layer for which no rank is worth it stays dense: its image is the target itself. Pass it to ``train_admm``.

    Args:
        model: dense in the eligible layers.
        profile: of the model, with the costs.
        config: budget or price, formats and layers.

    Raises:
        BudgetError: neither or both of budget and price, or a budget that cannot be met.
        PlanError: a format that is not a product of two matrices, or no eligible layer.

    Example:
        >>> from tenfold.profiling import profile
        >>> net = nn.Sequential(nn.Linear(32, 32, bias=False), nn.ReLU(), nn.Linear(32, 32, bias=False))
        >>> with torch.no_grad():
        ...     _ = net[0].weight.copy_(torch.diag(torch.arange(32.0) < 4))
        >>> learned = LearnedRanks(net, profile(net, torch.zeros(1, 32)), LcConfig(budget={"macs": 0.7}))
        >>> weights = {path: net.get_submodule(path).weight.detach() for path in learned.paths}
        >>> images = learned(net, weights, torch.ones(2))
        >>> learned.plan_for(net).layer("0").rank, learned.plan_for(net).after.macs <= 0.7 * 2048
        ({'rank': 4}, True)
    """

    chosen: Tensor

    def __init__(self, model: nn.Module, profile: Profile, config: LcConfig) -> None:
        super().__init__()
        limited = config.budget.limited
        if bool(config.budget) == (config.cost_weight is not None) or {"latency", "bytes"} & {*limited}:
            msg = "learned ranks need one of a budget of params or macs, such as macs=0.5, and a cost_weight"
            raise BudgetError(msg)
        odd = [name for name in config.formats if not issubclass(FORMATS.get(name), MatrixFormat)]
        if odd or not config.formats:
            known = [name for name, kind in FORMATS.items() if issubclass(kind, MatrixFormat)]
            msg = f"ranks are learned in the formats {', '.join(known)}, not {', '.join(odd) or 'in none'}"
            raise PlanError(msg)
        self.profile, self.config = profile, config
        self._paths = tuple(layer.path for layer in self._table(model).eligible)
        # Index of the format, and rank; -1 for layers that stay dense.
        self.register_buffer("chosen", torch.full((len(self._paths), 2), -1, device=device_of(model)))

    @property
    def paths(self) -> tuple[str, ...]:
        """The eligible layers."""
        return self._paths

    @property
    def identity(self) -> str:
        """Configuration and layers."""
        return f"learned at {self.config!r} of {', '.join(self._paths)}"

    def forward(self, model: nn.Module, targets: Mapping[str, Tensor], strengths: Tensor) -> dict[str, Tensor]:
        """Choose the ranks again (C-step), and return the nearest weights at these ranks, by path.

        r* = argmin λ·C(r) + ρ/2 · Σ_{i>r} σ_i², exact, each layer alone: σ are the singular values of the weight in one
        of its formats, all of whose ranks are tried (Idelbayev and Carreira-Perpiñán, CVPR 2020, theorem 1); C is the
        layer's share of the model's cost. Within a budget the knapsack chooses instead.
        """
        with plugged({find(model, p): t for p, t in targets.items()}):
            table = self._table(model)
            losses = {
                path: 0.5 * float(strength) * float(targets[path].double().square().sum())
                for path, strength in zip(self._paths, strengths.tolist(), strict=True)
            }
            table = table.replace(layers=tuple(_scaled(layer, losses.get(layer.path)) for layer in table.layers))
            plan = choose(table) if self.config.budget else choose(table, overrides=self._at_price(table))
        for i, path in enumerate(self._paths):
            layer = plan.layer(path)
            chosen = (-1, -1)
            if layer.action == "factorize":
                chosen = (self.config.formats.index(str(layer.format)), (layer.rank or {})["rank"])
            self.chosen[i] = torch.tensor(chosen)
        return {**targets, **PlanProjection(plan)(model, targets, strengths)}

    def plan_for(self, model: nn.Module) -> Plan:
        """Return the plan with the ranks of the last choice."""
        table = self._table(model)
        overrides = {}
        for path, (index, rank) in zip(self._paths, self.chosen.tolist(), strict=True):
            overrides[path] = Override()
            if index >= 0:
                options = table.layer(path).of(self.config.formats[index])
                option = int(np.flatnonzero(options.ranks[:, 0] == rank)[0])
                overrides[path] = Override(format=options.format, option=option)
        plan = choose(table, overrides=overrides)
        config = self.config
        note = f"rank learned at {config.budget or f'a price of {config.cost_weight}'}"
        layers = tuple(self._explained(layer, note) if layer.path in overrides else layer for layer in plan.layers)
        rule = {"name": "lc", "cost_weight": config.cost_weight, "cost": config.cost}
        return plan.replace(layers=layers, recipe=table.recipe.replace(rule=rule))

    def _explained(self, layer: LayerPlan, note: str) -> LayerPlan:
        return layer.replace(reason=note if layer.action == "factorize" else NOT_WORTH_IT)

    def _at_price(self, table: OptionTable) -> dict[str, Override]:
        """Return for each layer the row of the least loss plus price."""
        cost, weight = self.config.cost, self.config.cost_weight or 0.0
        price = weight / max(getattr(self.profile, cost), 1)
        overrides = {}
        for layer in table.eligible:
            row = int((layer.column("distortion") + price * layer.column(cost)).argmin())
            overrides[layer.path] = Override()
            if row:
                options, option = layer.place(row)
                overrides[layer.path] = Override(format=options.format, option=option)
        return overrides

    def _table(self, model: nn.Module) -> OptionTable:
        """Return all ranks of all formats: the one place where the planner is called."""
        config = self.config
        recipe = Recipe(
            budget=config.budget,
            rule={"name": "global", "step": 1},
            formats=config.formats,
            keep=config.keep,
            keep_ends=config.keep_ends,
            seed=config.seed,
        )
        return tabulate(model, self.profile, recipe)


def _scaled(layer: LayerOptions, loss: float | None) -> LayerOptions:
    """Return a layer whose distortions, which are shares of the energy of its weight, are in units of the loss."""
    if loss is None:
        return layer
    scaled = (own.replace(columns={"distortion": loss * own.columns["distortion"]}) for own in layer.options)
    return layer.replace(options=tuple(scaled))
