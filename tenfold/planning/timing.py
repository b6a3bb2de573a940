"""What planning knows of time: a clock for layers, and how long the whole model takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from tenfold.errors import BudgetError
from tenfold.formats import Rank
from tenfold.profiling import Clock, best_memory_format
from tenfold.profiling.memory_format import to_memory_format
from tenfold.ranks import RankProblem
from tenfold.records import Budget, Cost


@dataclass(frozen=True, eq=False)
class Timing:
    """The milliseconds that a latency budget is reckoned in, all in units of one clock.

    What no layer accounts for (activations, pooling, the interpreter) is the whole model less its layers; a plan does
    not change it.

    Attributes:
        clock: times layers in the memory format that the smaller model is to run in.
        model_ms: one forward of the model as it is, in the clock's memory format.
        dense_ms: one forward in the memory format that is best for the model as it is: what a share is a share of.
        tighten: factor on what is allowed, below 1 when earlier plans measured slower than predicted.
    """

    clock: Clock
    model_ms: float
    dense_ms: float
    tighten: float = 1.0

    @classmethod
    def of(cls, model: nn.Module, inputs: Any, clock: Clock, *, seconds: float = 4.0) -> Timing:
        """Return the timing of a model, measured in every memory format that matters for these inputs.

        Example:
            >>> import torch
            >>> clock = Clock(cache=None, timer=lambda spec, shape: 1.0, model_timer=lambda model, inputs: 5.0)
            >>> Timing.of(nn.Linear(4, 4), torch.zeros(2, 4), clock, seconds=0.1).dense_ms
            5.0
        """
        own = clock.model_ms(*to_memory_format(model, inputs, clock.memory_format), seconds=seconds / 2)
        _, result = best_memory_format(model, inputs, seconds=seconds, threads=clock.threads)
        times = {name: latency.median_ms for name, latency in result.latencies.items()}
        best = own * min(times.values()) / times[clock.memory_format]
        return cls(clock, own, min(own, best))

    def time(self, problems: Sequence[RankProblem]) -> list[RankProblem]:
        """Return the problems with what their layers take now and at other ranks; measures what is missing."""
        self.clock.prepare(problems)
        return [self._timed(problem) for problem in problems]

    def allowance(self, budget: Budget, cost: Cost, problems: Sequence[RankProblem]) -> float:
        """Return the milliseconds that the layers to decide on may take together.

        Raises:
            BudgetError: the rest of the model takes longer than all of it may.
        """
        allowed = budget.allowance(cost, self.dense_ms)["latency"] * self.tighten
        fixed = max(0.0, self.model_ms - sum(p.latency_ms or 0.0 for p in problems))
        if fixed >= allowed:
            msg = (
                f"the budget allows {allowed:.3g} ms, and what no plan changes (layers that stay, activations, the "
                f"interpreter) takes {fixed:.3g} of the {self.model_ms:.3g} ms. Raise the budget or keep fewer layers."
            )
            raise BudgetError(msg)
        return allowed - fixed

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

        if problem.current is None:
            now = self.clock.layer_ms(problem.spec, problem.calls)
        else:
            now = float(at(problem.current[0], [problem.current[1]])[0])
        return replace(problem, latency_ms=now, latency_at=at)
