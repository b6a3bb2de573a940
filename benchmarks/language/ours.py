"""tenfold under the protocol: one table of options, a plan for each share, layers fitted front to back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from benchmarks.language.protocol import Protocol
from tenfold.allocation import choose
from tenfold.pipeline import apply_decision
from tenfold.planning import decide
from tenfold.records import Budget, Recipe
from tenfold.runtime import Runtime


def ours(protocol: Protocol, settings: dict[str, Any]) -> Callable[[float], nn.Module]:
    """Return what makes a model of a share of the linear parameters, by a recipe with these fields."""
    model, runtime = protocol.model, Runtime(measure=False)
    total = sum(p.numel() for p in model.parameters())

    def budget(share: float) -> Budget:
        return Budget(max_params=int(total - (1 - share) * protocol.linear_params))

    recipe = Recipe.of({"seed": protocol.config["seed"], "budget": budget(max(protocol.config["shares"])), **settings})
    decision = decide(model, protocol.task.example_inputs(), recipe, data=protocol.calibration, runtime=runtime)

    def at(share: float) -> nn.Module:
        assert decision.table is not None
        plan = choose(decision.table, recipe.replace(budget=budget(share)))
        return apply_decision(replace(decision, plan=plan), plan, runtime)[0]

    return at
