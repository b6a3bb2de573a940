"""The trade-off curve of a model: plans for a row of budgets, what they predict, and what comes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import nn

from tenfold.errors import BudgetError
from tenfold.formats import FORMATS
from tenfold.planning.eligible import eligible_layer
from tenfold.planning.error_curves import Curve, weight_curve
from tenfold.records import LayerPlan, Plan, Profile, TradeOff, TradeOffPoint
from tenfold.records.metric import FRACTION

SHARES = tuple(round(0.1 + 0.05 * i, 2) for i in range(18))
BY_RULE = "predicted distortion of the rule"
BY_WEIGHT = "sum of the layers' squared relative weight errors"

Progress = Callable[[int, int], None]


def tradeoff(
    model: nn.Module,
    profile: Profile,
    make: Callable[[Mapping[str, float]], Plan],
    *,
    budget: str = "macs",
    shares: Sequence[float] = SHARES,
    score: Callable[[Plan], float] | None = None,
    baseline: float | None = None,
    progress: Progress | None = None,
) -> TradeOff:
    """Return what budgets from small to large lead to, so that a person can choose one by looking.

    The predicted distortion is the sum of what the rule says of each layer; for one that says nothing, the sum of the
    squared relative errors of the weights, as the tails of their spectra bound them.

    Args:
        model: that was profiled.
        profile: what ``profile`` said of it.
        make: returns the plan for a budget, such as ``lambda b: plan(model, profile, rule=rule, budget=b)``.
        budget: ``params``, ``macs`` or ``latency``.
        shares: the budgets.
        score: returns the score of the model after a plan; nothing is carried out without. Its attribute ``metric``
            says what that is, if it has one.
        baseline: the score of the model as it is.
        progress: called with (done, in all).

    Example:
        >>> import torch
        >>> from tenfold.planning import plan
        >>> from tenfold.profiling import profile
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> cost = profile(net, torch.zeros(1, 64))
        >>> make = lambda b: plan(net, cost, {"rule": "ratio", "budget": b})
        >>> curve = tradeoff(net, cost, make, shares=[0.001, 0.25, 0.5])
        >>> [point.budget for point in curve.points], curve.unreachable
        ([0.25, 0.5], (0.001,))
    """
    plans: dict[float, Plan] = {}
    scores: dict[float, float] = {}
    unreachable = []
    for done, share in enumerate(sorted(shares), start=1):
        try:
            plans[share] = make({budget: share})
        except BudgetError:
            unreachable.append(share)
        if score is not None and share in plans:
            scores[share] = score(plans[share])
        if progress is not None:
            progress(done, len(shares))
    known = all(layer.distortion is not None for made in plans.values() for layer in made.factorized)
    distortion = _by_rule if known and any(made.factorized for made in plans.values()) else _Weights(model, profile)
    return TradeOff(
        model=profile.model,
        budget=budget,
        rule=next((made.recipe.rule for made in plans.values()), {}),
        distortion=BY_RULE if distortion is _by_rule else BY_WEIGHT,
        before=profile.cost,
        baseline=baseline,
        metric=getattr(score, "metric", FRACTION),
        points=tuple(
            TradeOffPoint(budget=share, cost=made.after, distortion=distortion(made), score=scores.get(share))
            for share, made in plans.items()
        ),
        unreachable=tuple(unreachable),
    )


def _by_rule(made: Plan) -> float:
    return sum(layer.distortion or 0.0 for layer in made.factorized)


class _Weights:
    """Sums the squared relative errors of the weights that a plan would leave."""

    def __init__(self, model: nn.Module, profile: Profile) -> None:
        self._model, self._profile = model, profile
        self._curves: dict[tuple[str, str], Curve] = {}

    def __call__(self, made: Plan) -> float:
        return sum(self._layer(layer) for layer in made.factorized)

    def _layer(self, planned: LayerPlan) -> float:
        format = str(planned.format)
        key = (planned.path, format)
        if key not in self._curves:
            layer = eligible_layer(self._model, self._profile.layer(planned.path), [format])
            self._curves[key] = weight_curve(layer, format, layer.load_weight())
        rank = planned.rank or {}
        row = np.array([[rank[name] for name in FORMATS.get(format).rank_names]])
        return float(self._curves[key](row)[0])
