"""Learned ranks: the LC algorithm re-chooses the rank of each layer while the weights are trained to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import NonNegativeInt, PositiveFloat, field_validator
from torch import Tensor, nn

from tenfold.errors import BudgetError, PlanError
from tenfold.formats import FORMATS
from tenfold.formats.matrix import MatrixFormat
from tenfold.planning import plan as make_plan
from tenfold.ranks import Choice, Choose, Keep, RankRule
from tenfold.records import Budget, Plan, Profile, Record
from tenfold.surgery import find
from tenfold.tracing.contexts import device_of
from tenfold.training.low_rank.admm import plugged
from tenfold.training.low_rank.learned_rules import NOT_WORTH_IT, CostName, FoundRanks, PenalizedRank
from tenfold.training.low_rank.projection import PlanProjection, Projection

_OPEN = "its rank is to be learned"


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
    formats: tuple[str, ...] = ("low_rank",)
    keep: tuple[str, ...] = ()
    keep_ends: bool = True
    seed: NonNegativeInt = 0

    @field_validator("budget", mode="before")
    @classmethod
    def _read_budget(cls, value: Any) -> Any:
        return Budget.of(dict(value)) if isinstance(value, Mapping) else value


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
        if bool(config.budget) == (config.cost_weight is not None) or config.budget.latency is not None:
            msg = "learned ranks need one of a budget of params or macs, such as macs=0.5, and a cost_weight"
            raise BudgetError(msg)
        odd = [name for name in config.formats if not issubclass(FORMATS.get(name), MatrixFormat)]
        if odd or not config.formats:
            known = [name for name, kind in FORMATS.items() if issubclass(kind, MatrixFormat)]
            msg = f"ranks are learned in the formats {', '.join(known)}, not {', '.join(odd) or 'in none'}"
            raise PlanError(msg)
        self.profile, self.config = profile, config
        eligible = self._plan(model, FoundRanks("lc", {}, _OPEN))
        self._paths = tuple(layer.path for layer in eligible.layers if layer.reason == _OPEN)
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
        """Choose the ranks anew (C-step), and return the nearest weights at these ranks, by path."""
        rule = PenalizedRank(
            cost_weight=self.config.cost_weight,
            cost=self.config.cost,
            strengths=dict(zip(self._paths, strengths.tolist(), strict=True)),
            whole={"params": self.profile.params, "macs": self.profile.macs},
        )
        with plugged({find(model, p): t for p, t in targets.items()}):
            plan = self._plan(model, rule)
        for i, path in enumerate(self._paths):
            layer = plan.layer(path)
            chosen = (-1, -1)
            if layer.action == "factorize":
                chosen = (self.config.formats.index(str(layer.format)), (layer.rank or {})["rank"])
            self.chosen[i] = torch.tensor(chosen)
        return {**targets, **PlanProjection(plan)(model, targets, strengths)}

    def plan_for(self, model: nn.Module) -> Plan:
        """Return the plan with the ranks of the last choice."""
        config = self.config
        note = f"rank learned at {config.budget or f'a price of {config.cost_weight}'}"
        chosen: dict[str, Choice] = {
            path: Keep(NOT_WORTH_IT) if index < 0 else Choose(config.formats[index], {"rank": rank}, note)
            for path, (index, rank) in zip(self._paths, self.chosen.tolist(), strict=True)
        }
        plan = self._plan(model, FoundRanks("lc", chosen, NOT_WORTH_IT))
        return plan.replace(rule=PenalizedRank(config.cost_weight, config.cost).to_dict())

    def _plan(self, model: nn.Module, rule: RankRule) -> Plan:
        """Plan by a rule: the one place where the planner is called."""
        config = self.config
        return make_plan(
            model,
            self.profile,
            rule=rule,
            formats=config.formats,
            keep=config.keep,
            keep_ends=config.keep_ends,
            budget=config.budget or None,
            seed=config.seed,
        )
