"""A small network with its option table."""

from __future__ import annotations

import torch
from torch import nn

from tenfold.allocation import pruned
from tenfold.explorer import Explorer
from tenfold.planning import Timing, plan, tabulate
from tenfold.profiling import profile
from tenfold.records import OptionTable, Plan, Recipe

X = torch.zeros(2, 3, 8, 8)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 32, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=2),
        nn.Flatten(),
        nn.Linear(512, 40),
        nn.ReLU(),
        nn.Linear(40, 2),
    ).eval()


class Made:
    """A network, planned for; ``timing`` is for budgets of latency."""

    def __init__(self, model: nn.Module | None = None, inputs: torch.Tensor = X, timing: Timing | None = None) -> None:
        self.model = net() if model is None else model
        self.profile = profile(self.model, inputs)
        self.timing = timing

    def plan(self, **budget: float) -> Plan:
        return plan(self.model, self.profile, Recipe.of({"budget": budget}), timing=self.timing)

    def table(self, **budget: float) -> OptionTable:
        return tabulate(self.model, self.profile, Recipe.of({"budget": budget}), timing=self.timing)

    def explorer(self, **budget: float) -> Explorer:
        """Return an explorer of what would be read from a file."""
        table = pruned(self.table(**(budget or {"macs": 0.5})))
        return Explorer(OptionTable.model_validate_json(table.model_dump_json(exclude_none=True)))
