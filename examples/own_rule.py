"""A rank rule of one's own in one file: the same error in every layer, as a threshold on a column of the option table.

    python examples/own_rule.py

Nothing else has to be edited: the registry finds the rule, recipes name it, budgets aim its threshold, and the laws of
``tenfold.testing`` test it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

import tenfold
from tenfold.allocation import RULES, ThresholdRule
from tenfold.allocation.rules.threshold import first_within
from tenfold.records import FormatOptions, LayerOptions
from tenfold.testing import check_rule


@RULES.register("equal_error")
@dataclass(frozen=True)
class EqualError(ThresholdRule):
    """The smallest ranks whose expected squared relative error is within a bound, the same for all layers.

    Attributes:
        bound: in (0, 1); None to let a budget set it.
    """

    bound: float | None = None

    rows: ClassVar[str] = "saving"  # ranks that make a layer cheaper, coarsest first
    columns: ClassVar[tuple[str, ...]] = ("expected_error",)  # what is computed for them, and nothing else
    numbers: ClassVar[tuple[str, ...]] = ("bound",)

    def level(self) -> float | None:
        """Return the share of ‖W‖² to keep; None where a budget sets it."""
        return None if self.bound is None else 1 - self.bound

    def row(self, layer: LayerOptions, options: FormatOptions, level: float) -> int | None:
        """Return the cheapest option within the bound."""
        del layer  # the same bound for all
        return first_within(options.columns["expected_error"], 1 - level)

    def note(self, level: float) -> str:
        """Return the reason that plans show."""
        return f"expected squared error at most {1 - level:.3f}"


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 16, 1))
    cost = tenfold.profile(model, torch.zeros(1, 16, 12, 12))

    bounded = tenfold.plan(model, cost, {"rule": {"name": "equal_error", "bound": 0.6}})
    print(f"at most 0.6: {bounded.after.macs / cost.macs:.0%} of the MACs")

    table = tenfold.tabulate(model, cost, {"rule": "equal_error", "budget": "macs=0.5"})
    for share in (0.7, 0.5, 0.3):  # the budget sets the bound: another choice from the same table
        plan = tenfold.choose(table, table.recipe.replace(budget=tenfold.Budget(macs=share)))
        assert plan.after.macs <= share * cost.macs
        print(f"{share:.0%}: {next(layer.reason for layer in plan.factorized)}")

    check_rule(EqualError(bound=0.5))


if __name__ == "__main__":
    main()
