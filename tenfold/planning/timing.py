"""What planning knows of time: a clock for layers, and what part of a forward they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from tenfold.errors import BudgetError
from tenfold.formats import Rank
from tenfold.profiling import LatencyTable, best_memory_format, to_memory_format
from tenfold.profiling import profile as make_profile
from tenfold.ranks import RankProblem
from tenfold.records import Budget, Cost, ForwardTime, LayerProfile, Plan, Profile


@dataclass(frozen=True, eq=False)
class Timing:
    """What a latency budget is reckoned with: a clock for layers, and what part of a forward layers are.

    All is in milliseconds of the clock, in which layers are timed one by one. A whole model differs from their sum
    (cold caches, activations between them); so of the model only ratios are taken, each from measurements in turns or
    within one forward. What is spent outside of layers is what no plan changes.

    Attributes:
        clock: times layers in the memory format that the smaller model is to run in.
        profile: of the model as it is.
        layer_share: the part of a forward spent in layers with a geometry, in (0, 1].
        dense_ms: one forward of the model as it is, in the memory format that is best for it.
        best_share: that time as a share of the one in the clock's memory format, at most 1.
        tighten: factor on what is allowed, below 1 when earlier plans measured slower than predicted.
    """

    clock: LatencyTable
    profile: Profile
    layer_share: float
    dense_ms: float
    best_share: float = 1.0
    tighten: float = 1.0

    @classmethod
    def of(
        cls, model: nn.Module, inputs: Any, clock: LatencyTable, *, profile: Profile | None = None, seconds: float = 4.0
    ) -> Timing:
        """Return the timing of a model, measured in every memory format that matters for these inputs.

        Example:
            >>> import torch
            >>> clock = LatencyTable(cache=None, timer=lambda spec, shape: 1.0, model_timer=lambda model, inputs: 5.0)
            >>> Timing.of(nn.Linear(4, 4), torch.zeros(2, 4), clock, seconds=0.1).layer_share
            0.2
        """
        profile = make_profile(model, inputs) if profile is None else profile
        _, result = best_memory_format(model, inputs, seconds=seconds, threads=clock.threads)
        times = {name: latency.median_ms for name, latency in result.latencies.items()}
        own, own_inputs = to_memory_format(model, inputs, clock.memory_format)
        share = clock.share_of_layers(own, own_inputs, [x for x in profile.layers if x.calls], seconds=seconds / 2)
        best = min(times.values())
        return cls(clock, profile, share, best, best / times.get(clock.memory_format, best))

    def time(self, problems: Sequence[RankProblem]) -> list[RankProblem]:
        """Return the problems with what their layers take now and at other ranks; measures what is missing."""
        self.clock.prepare(problems)
        return [self._timed(problem) for problem in problems]

    def allowance(self, budget: Budget, cost: Cost, problems: Sequence[RankProblem]) -> float:
        """Return the milliseconds that the layers to decide on may take together.

        Raises:
            BudgetError: the rest of the model takes longer than all of it may.
        """
        share = budget.allowance(cost, self.dense_ms)["latency"] / self.dense_ms
        time = self.forward_time()
        whole, allowed = time.whole_ms, time.allowed(share)
        fixed = whole - sum(p.latency_ms or 0.0 for p in problems)
        if fixed >= allowed:
            msg = (
                f"the budget allows {share * self.tighten:.1%} of the time, and what no plan changes (layers that "
                f"stay, activations, the interpreter) takes {fixed / whole / self.best_share:.1%}. Raise the budget or "
                "keep fewer layers."
            )
            raise BudgetError(msg)
        return allowed - fixed

    def share_of(self, plan: Plan) -> float:
        """Return what share of the model's time a plan should take, by all that the clock has learnt until now."""
        whole = self.forward_time().whole_ms
        planned = ((layer, self.profile.layer(layer.path)) for layer in plan.factorized)
        saved = sum(
            self._now(known) - self._in(str(layer.format), layer.rank or {}, known)
            for layer, known in planned
            if known.spec is not None and known.calls
        )
        return (whole - saved) / (whole * self.best_share)

    def forward_time(self) -> ForwardTime:
        """Return what a budget of latency is reckoned with, as a record."""
        shapes = self.profile.input_shapes
        return ForwardTime(
            dense_ms=self.dense_ms,
            whole_ms=sum(self._now(layer) for layer in self.profile.layers) / self.layer_share,
            best_share=self.best_share,
            tighten=self.tighten,
            batch_size=shapes[0][0] if shapes and shapes[0] else None,
        )

    def tightened(self, factor: float) -> Timing:
        """Return the same timing with an allowance that is ``factor`` times as large."""
        return replace(self, tighten=self.tighten * factor)

    def _timed(self, problem: RankProblem) -> RankProblem:
        known: dict[tuple[Any, ...], NDArray[np.float64]] = {}  # rules with one knob ask for the same again and again

        def at(format: str, ranks: Sequence[Rank]) -> NDArray[np.float64]:
            key = (format, *(tuple(sorted(rank.items())) for rank in ranks))
            if key not in known:
                known[key] = self.clock.predict(format, problem.spec, problem.calls, ranks)
            return known[key]

        now = self._now(self.profile.layer(problem.path))
        return replace(problem, latency_ms=now, latency_at=at)

    def _now(self, layer: LayerProfile) -> float:
        """Return what a layer takes as it is."""
        if layer.spec is None or not layer.calls:
            return 0.0
        if layer.format is None or layer.rank is None:
            return self.clock.layer_ms(layer.spec, layer.calls)
        return self._in(layer.format, layer.rank, layer)

    def _in(self, format: str, rank: Rank, layer: LayerProfile) -> float:
        """Return what a layer with a geometry takes in a format."""
        if layer.spec is None:
            return 0.0
        return float(self.clock.predict(format, layer.spec, layer.calls, [rank])[0])
