"""A small network with its candidates, and a clock whose answers are known."""

from __future__ import annotations

from typing import Any

import torch
from tenfold.ranks import rule_from
from torch import nn

from tenfold.explorer import Explorer
from tenfold.planning import candidates, plan
from tenfold.profiling import profile
from tenfold.records import Candidates, Plan

FORMATS = ("tucker2", "low_rank", "spatial")
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
    """A network with what plans for it need; ``choices`` are all that ``plan`` takes besides rule and budget."""

    def __init__(self, model: nn.Module | None = None, inputs: torch.Tensor = X, **choices: Any) -> None:
        self.model = net() if model is None else model
        self.profile = profile(self.model, inputs)
        self.choices = {"formats": FORMATS, "memory": {}, **choices}

    def plan(self, settings: dict[str, Any] | None = None, **budget: float) -> Plan:
        rule = rule_from("global", **(settings or {}))
        return plan(self.model, self.profile, rule=rule, budget=budget, **self.choices)

    def candidates(self, made: Plan) -> Candidates:
        return candidates(self.model, self.profile, made, **self.choices)

    def explorer(self, made: Plan | None = None) -> Explorer:
        """Return an explorer of what would be read from a file."""
        found = self.candidates(self.plan(macs=0.5) if made is None else made)
        return Explorer(Candidates.model_validate_json(found.model_dump_json(exclude_defaults=True)))
