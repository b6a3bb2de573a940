"""Learned ranks: how low the rank of each layer gets is decided again and again while the weights are drawn there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tenfold.errors import BudgetError, PlanError
from tenfold.formats import FORMATS
from tenfold.formats.matrix import MatrixFormat
from tenfold.planning import plan as make_plan
from tenfold.ranks import Choice, Choose, Keep, Limits, RankProblem, RankRule
from tenfold.ranks.base import total_cost, unreachable
from tenfold.ranks.candidates import grids
from tenfold.records import Budget, Plan, Profile
from tenfold.surgery import find
from tenfold.training.batches import Batches
from tenfold.training.config import TuneConfig
from tenfold.training.low_rank.admm import AdmmConfig, plugged
from tenfold.training.low_rank.found_ranks import FoundRanks
from tenfold.training.low_rank.projection import PlanProjection, Projection
from tenfold.training.low_rank.train_admm import LowRankResult, folders, replace_and_tune, train_towards

CostName = Literal["params", "macs"]
_OPEN = "its rank is to be learned"
_STAYS = "learned: what it would save is worth less than what it would lose"


@dataclass(frozen=True)
class PenalizedRank(RankRule):
    """The C-step of the LC algorithm: r* = argmin λ·C(r) + ρ/2 · Σ_{i>r} σ_i², exact, each layer alone.

    σ are the singular values of the weight in one of its admissible formats, all of whose ranks are tried (Idelbayev
    and Carreira-Perpiñán, CVPR 2020, theorem 1); C is the layer's share of the model's cost, or its cost as it is where
    the layer stays dense. Under limits, λ is the smallest that respects them, by bisection, and what then
    still fits is given to the layers that gain most from it.

    Attributes:
        cost_weight: λ, in units of the loss for the whole model; without it limits are needed.
        cost: what C counts, without limits; with them, C adds up what they name.
        strengths: ρ by path; 1 where left out.
        whole: cost of the model by name, of which C is a share; that of the layers to decide on if left out.
    """

    cost_weight: float | None = None
    cost: CostName = "macs"
    strengths: Mapping[str, float] = field(default_factory=dict)
    whole: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def name(cls) -> str:
        """Return the name under which plans know it."""
        return "lc"

    def to_dict(self) -> dict[str, Any]:
        """Return what a reader of a plan wants to know of it."""
        return {"name": self.name(), "cost_weight": self.cost_weight, "cost": self.cost}

    def select(self, problems: Sequence[RankProblem], limits: Limits | None = None) -> tuple[Choice, ...]:
        """Return the best rank of each layer at the configured λ, or at the smallest that respects the limits."""
        names: list[CostName] = [n for n in ("params", "macs") if n in limits] if limits else [self.cost]
        whole = self.whole or {name: sum(getattr(p.cost, name) for p in problems) for name in names}
        options = [_Options.of(p, names, whole, self.strengths.get(p.path, 1.0)) for p in problems]
        if not limits:
            if self.cost_weight is None:
                msg = "learned ranks need a price of cost or a budget: give cost_weight, or a budget such as macs=0.5"
                raise BudgetError(msg)
            return tuple(o.choices[o.best(self.cost_weight)] for o in options)
        return _within(problems, options, limits, names)


@dataclass(frozen=True, eq=False)
class _Options:
    """All that may happen to one layer, as rows: to stay, then each rank of each format."""

    choices: tuple[Choice, ...]
    losses: NDArray[np.float64]  # (n,) ρ/2 · dropped energy
    amounts: NDArray[np.float64]  # (n, names) what the layer costs
    costs: NDArray[np.float64]  # (n,) the sum of these, as shares of the model

    @classmethod
    def of(cls, problem: RankProblem, names: Sequence[CostName], whole: Mapping[str, int], strength: float) -> _Options:
        choices: list[Choice] = [Keep(_STAYS)]
        losses, amounts = [np.zeros(1)], [np.array([[float(getattr(problem.cost, n)) for n in names]])]
        for grid in grids(problem, step=1):
            energy = problem.spectra(grid.format)["rank"].square().numpy()
            left = np.append(energy[::-1].cumsum()[::-1], 0.0)  # what ranks 0, 1, ... drop
            ranks = grid.ranks[:, 0]
            losses.append(0.5 * strength * left[ranks])
            amounts.append(grid.costs(names))
            share = left[ranks] / max(left[0], 1e-30)
            choices += [
                Choose(grid.format, {"rank": int(r)}, f"learned: drops {100 * s:.2g} % of the energy", float(s))
                for r, s in zip(ranks, share, strict=True)
            ]
        found = np.concatenate(amounts)
        costs = (found / [max(whole[n], 1) for n in names]).sum(1)
        return cls(tuple(choices), np.concatenate(losses), found, costs)

    def best(self, price: float) -> int:
        """Return the row with the least loss plus price times cost."""
        return int((self.losses + price * self.costs).argmin())


def _within(
    problems: Sequence[RankProblem], options: Sequence[_Options], limits: Limits, names: Sequence[CostName]
) -> tuple[Choice, ...]:
    """Return the choices at the smallest price at which the limits are respected, and what else fits in then."""

    def at(price: float) -> list[int]:
        return [o.best(price) for o in options]

    allowed = np.array([limits[name] for name in names])

    def fits(rows: Sequence[int]) -> bool:
        total = sum((o.amounts[row] for o, row in zip(options, rows, strict=True)), np.zeros(len(names)))
        return bool((total <= allowed).all())

    low, high = 0.0, 1e-6
    if fits(at(low)):
        high = low
    while not fits(at(high)):
        if high > 1e15:
            least = total_cost(problems, [o.choices[row] for o, row in zip(options, at(high), strict=True)])
            raise BudgetError(unreachable(least, limits))
        low, high = high, high * 10
    for _ in range(50 if high > low else 0):
        middle = (low * high) ** 0.5 if low else high / 2
        low, high = (low, middle) if fits(at(middle)) else (middle, high)
    rows = _filled(options, at(high), fits)
    return tuple(o.choices[row] for o, row in zip(options, rows, strict=True))


def _filled(options: Sequence[_Options], rows: list[int], fits: Callable[[Sequence[int]], bool]) -> list[int]:
    """Return the rows with what else fits, the most loss saved per cost first: a price alone skips some choices."""
    steps = []
    for i, (option, row) in enumerate(zip(options, rows, strict=True)):
        saved, more = option.losses[row] - option.losses, option.costs - option.costs[row]
        worth = (saved > 0) & (more > 0)
        steps += [(saved[j] / more[j], i, int(j)) for j in np.flatnonzero(worth)]
    for _, i, j in sorted(steps, reverse=True):
        tried = [*rows[:i], j, *rows[i + 1 :]]
        if options[i].losses[j] < options[i].losses[rows[i]] and fits(tried):
            rows = tried
    return rows


class LearnedRanks(Projection):
    """The projection of the LC algorithm: onto weights whose format and rank are the best for a price or a budget.

    A layer for which no rank is worth it stays dense: its image is the target itself.

    Args:
        model: dense in the layers to decide on.
        profile: of the model; its costs count.
        budget: what the whole model may cost in ``params`` or ``macs``, met by every choice of ranks.
        cost_weight: λ, the price of the whole model's cost in units of the loss; instead of a budget.
        cost: what λ is the price of.
        formats: products of two matrices: ``low_rank`` (scheme 1 of the paper), ``spatial`` (scheme 2). Each layer
            takes what suits it better.
        choices: ``keep``, ``keep_ends`` and ``seed`` of ``plan``.

    Raises:
        BudgetError: neither or both of budget and price, or a budget that cannot be met.
        PlanError: a format that is not a product of two matrices, or no layer to decide on.

    Example:
        >>> from tenfold.profiling import profile
        >>> net = nn.Sequential(nn.Linear(32, 32, bias=False), nn.ReLU(), nn.Linear(32, 32, bias=False))
        >>> with torch.no_grad():
        ...     _ = net[0].weight.copy_(torch.diag(torch.arange(32.0) < 4))
        >>> learned = LearnedRanks(net, profile(net, torch.zeros(1, 32)), budget={"macs": 0.7})
        >>> weights = {path: net.get_submodule(path).weight.detach() for path in learned.paths}
        >>> images = learned(net, weights, torch.ones(2))
        >>> learned.plan(net).layer("0").rank, learned.plan(net).after.macs <= 0.7 * 2048
        ({'rank': 4}, True)
    """

    chosen: Tensor

    def __init__(
        self,
        model: nn.Module,
        profile: Profile,
        *,
        budget: Budget | Mapping[str, float] | None = None,
        cost_weight: float | None = None,
        cost: CostName = "macs",
        formats: Sequence[str] = ("low_rank",),
        **choices: Any,
    ) -> None:
        super().__init__()
        self.budget = Budget.of(dict(budget) if isinstance(budget, Mapping) else budget)
        if bool(self.budget) == (cost_weight is not None) or self.budget.latency is not None:
            msg = "learned ranks need one of a budget of params or macs, such as macs=0.5, and a cost_weight"
            raise BudgetError(msg)
        odd = [name for name in formats if not issubclass(FORMATS.get(name), MatrixFormat)]
        if odd or not formats:
            known = [name for name, kind in FORMATS.items() if issubclass(kind, MatrixFormat)]
            msg = f"ranks are learned in the formats {', '.join(known)}, not {', '.join(odd) or 'in none'}"
            raise PlanError(msg)
        self.profile, self.formats, self.options = profile, tuple(formats), choices
        self.cost_weight, self.cost = cost_weight, cost
        opened = make_plan(model, profile, rule=FoundRanks("lc", {}, _OPEN), formats=self.formats, **choices)
        self._paths = tuple(layer.path for layer in opened.layers if layer.reason == _OPEN)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        # Number of the format and rank; -1 for layers that stay dense.
        self.register_buffer("chosen", torch.full((len(self._paths), 2), -1, device=device))

    @property
    def paths(self) -> tuple[str, ...]:
        """The layers whose rank is learned."""
        return self._paths

    @property
    def identity(self) -> str:
        """Budget or price, formats and layers."""
        price = self.budget or f"{self.cost_weight} for {self.cost}"
        return f"learned {', '.join(self.formats)} at {price} of {', '.join(self._paths)}"

    def forward(self, model: nn.Module, targets: Mapping[str, Tensor], strengths: Tensor) -> dict[str, Tensor]:
        """Return the nearest weights at the best ranks, by path; the choice of ranks is kept (C-step)."""
        rule = PenalizedRank(
            cost_weight=self.cost_weight,
            cost=self.cost,
            strengths=dict(zip(self._paths, strengths.tolist(), strict=True)),
            whole={"params": self.profile.params, "macs": self.profile.macs},
        )
        with plugged({find(model, p): t for p, t in targets.items()}):
            plan = self._make(model, rule)
        for i, path in enumerate(self._paths):
            layer = plan.layer(path)
            chosen = (-1, -1)
            if layer.action == "factorize":
                chosen = (self.formats.index(str(layer.format)), (layer.rank or {})["rank"])
            self.chosen[i] = torch.tensor(chosen)
        return {**targets, **PlanProjection(plan)(model, targets, strengths)}

    def plan(self, model: nn.Module) -> Plan:
        """Return the plan with the ranks of the last choice."""
        chosen: dict[str, Choice] = {}
        for path, (number, rank) in zip(self._paths, self.chosen.tolist(), strict=True):
            note = f"rank learned at {self.budget}" if self.budget else f"rank learned at a price of {self.cost_weight}"
            chosen[path] = Keep(_STAYS) if number < 0 else Choose(self.formats[number], {"rank": rank}, note)
        made = self._make(model, FoundRanks("lc", chosen, _STAYS))
        return made.replace(rule=PenalizedRank(self.cost_weight, self.cost).to_dict())

    def _make(self, model: nn.Module, rule: RankRule) -> Plan:
        budget = self.budget or None
        return make_plan(model, self.profile, rule=rule, formats=self.formats, budget=budget, **self.options)


def train_lc(  # noqa: PLR0913 - two trainings and a search in one call
    model: nn.Module,
    profile: Profile,
    batches: Batches,
    config: TuneConfig | None = None,
    admm: AdmmConfig | None = None,
    *,
    budget: Budget | Mapping[str, float] | None = None,
    cost_weight: float | None = None,
    cost: CostName = "macs",
    formats: Sequence[str] = ("low_rank",),
    choices: Mapping[str, Any] | None = None,
    tune: TuneConfig | None = None,
    folder: str | Path | None = None,
    identity: str = "",
    **options: Any,
) -> LowRankResult:
    """Return a factorized model whose ranks were learned together with its weights, by the LC algorithm.

    min loss(W) + λ Σ C(r) over W = Θ, rank Θ ≤ r (Idelbayev and Carreira-Perpiñán, CVPR 2020): the very loop of
    ``train_admm``, with a projection that chooses the ranks too. Multipliers and penalties are those of the paper with
    U = −β/μ; with a budget, λ is found anew at every choice.

    Args:
        model: dense in the layers to decide on; stays as it is.
        profile: of the model; its costs count.
        batches: as in ``finetune``.
        config: training towards low rank, see ``train_towards``.
        admm: how hard to pull. A price is weighed against the scheduled strength, without the boosts: ``last_rho``
            decides, together with ``cost_weight``, where ranks end. Under a budget only proportions matter.
        budget: what the whole model may cost, in ``params`` or ``macs``.
        cost_weight: λ, instead of a budget.
        cost: what λ is the price of.
        formats: see ``LearnedRanks``.
        choices: ``keep``, ``keep_ends`` and ``seed`` of ``plan``.
        tune: of the factorized model; None for none.
        folder: where to store the epochs of both trainings; the same call goes on where it was cut off.
        identity: what the run is about, in any words.
        options: ``loss`` and ``evaluate``, for both trainings; ``update_every``, ``on_epoch`` and ``progress`` of
            ``train_towards``.

    Raises:
        BudgetError: neither or both of budget and price, or a budget that cannot be met.
        TenfoldError: see ``finetune``.

    Example:
        >>> from tenfold.profiling import profile
        >>> _ = torch.manual_seed(0)
        >>> net, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)), torch.randn(64, 16)
        >>> data = [(x, (x[:, 0] > 0).long())] * 20
        >>> found = train_lc(net, profile(net, x[:1]), data, TuneConfig(epochs=10, lr=0.1), budget={"macs": 0.5})
        >>> found.plan.after.macs <= 0.5 * found.plan.before.macs, found.plan.rule["name"]
        (True, 'lc')
    """
    config = config or TuneConfig()
    learned = LearnedRanks(
        model, profile, budget=budget, cost_weight=cost_weight, cost=cost, formats=formats, **(choices or {})
    )
    towards, tuning = folders(folder)
    found = train_towards(model, learned, batches, config, admm, folder=towards, identity=identity, **options)
    common = {name: options.get(name) for name in ("loss", "evaluate")}
    plan = learned.plan(found.model)
    return replace_and_tune(found, plan, batches, config, tune, folder=tuning, identity=identity, **common)
