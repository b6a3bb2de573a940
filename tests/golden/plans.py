"""What plans are compared by: networks × rules × budgets × {weights, data} × {no clock, a fake clock}.

``python -m tests.golden.plans`` writes ``plans.json`` anew; do so only where other ranks are wanted.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tenfold.allocation import choose
from tenfold.calibration import calibrate, called_layers
from tenfold.errors import TenfoldError
from tenfold.planning import Sensitivity, tabulate
from tenfold.planning.target import Target
from tenfold.planning.timing import Timing
from tenfold.profiling import LatencyTable, profile
from tenfold.records import LayerSpec, OptionTable, Plan, Recipe
from tenfold.runtimes import runtime_named
from tests.golden.nets import NETS

FILE = Path(__file__).with_name("plans.json")

RULES: dict[str, dict[str, Any]] = {
    "global": {},
    "ratio": {},
    "energy": {},
    "evbmf": {"min_rank": 2},
    "error": {"sweeps": 5},
    "accuracy_drop": {"step": 2},
    "fixed": {"ranks": {"*": 3}},
}
BUDGETS = (
    ({"macs": 0.5}, 0.7),
    ({"params": 0.4}, 0.8),
    ({"params": 0.7, "macs": 0.6}, 0.6),
    ({"macs": 0.35}, 0.5),
)

Found = dict[str, Any]


def _milliseconds(spec: LayerSpec, in_shape: tuple[int, ...]) -> float:
    """Return the time of a layer on a machine that dislikes small layers and odd numbers of channels."""
    odd = 1.3 if getattr(spec, "out_channels", 8) % 4 else 1.0
    return 0.004 + odd * spec.macs(in_shape) / 4e6


class Subject:
    """A network with all that plans for it go by."""

    def __init__(self, name: str) -> None:
        net = NETS[name]
        self.model, self.inputs = net.build(), net.sample()
        self.timed, self.untimed = net.formats, (*net.formats, *net.untimed)
        self.profile = profile(self.model, self.inputs)
        self.moments = calibrate(self.model, [net.sample(s, 16) for s in (1, 2)], called_layers(self.profile))
        clock = LatencyTable(cache=None, timer=_milliseconds)
        timing = Timing(Target(runtime_named("torch"), clock, self.profile), layer_share=0.9, dense_ms=1.0)
        self.timing = replace(timing, dense_ms=timing.forward_time().whole_ms)
        self.seen = net.sample(3, 32)
        with torch.no_grad():
            self.answers = self.model(self.seen)

    def score(self, model: nn.Module) -> float:
        """Return how near the outputs of a model are to those of the original, up to 1."""
        with torch.no_grad():
            return 1 - float((model(self.seen) - self.answers).norm() / self.answers.norm())

    def scores(self, rule: str) -> Sensitivity | None:
        """Return scores for the one rule that needs some."""
        if rule != "accuracy_drop":
            return None
        return Sensitivity(
            self.model, self.profile, {"formats": self.untimed}, evaluate=self.score, batches=[self.seen]
        )

    def plans(self, rule_name: str) -> dict[str, Found]:
        """Return what comes of every budget, with and without data and clock; budgets share their tables."""
        scores = self.scores(rule_name)
        found: dict[str, Found] = {}
        for moments, source in ((None, "weights"), (self.moments, "data")):
            tables: dict[str, OptionTable] = {}
            for budget, latency in BUDGETS:
                for clock in ("no clock", "clock"):
                    limits = budget if clock == "no clock" else {**budget, "latency": latency}
                    shown = ",".join(f"{k}={v}" for k, v in limits.items())
                    rule = {"name": rule_name, **RULES[rule_name]}
                    recipe = Recipe.of({"budget": limits, "rule": rule, "formats": self.untimed})
                    try:
                        if "no clock" not in tables:
                            table = tabulate(self.model, self.profile, recipe, moments=moments, scores=scores)
                            tables = {"no clock": table, "clock": self.timing.time(_only(table, self.timed))}
                        found[f"{source}, {clock}, {shown}"] = _shown(choose(tables[clock], recipe))
                    except TenfoldError as error:
                        found[f"{source}, {clock}, {shown}"] = {"error": type(error).__name__}
        return found


def _only(table: OptionTable, formats: tuple[str, ...]) -> OptionTable:
    """Return the table with options in some formats."""
    layers = (
        layer.replace(options=tuple(own for own in layer.options if own.format in formats)) for layer in table.layers
    )
    return table.replace(layers=tuple(layers))


def _shown(made: Plan) -> Found:
    """Return the formats and ranks of a plan."""
    chosen = {
        layer.path: " ".join([str(layer.format), *(f"{k}={v}" for k, v in (layer.rank or {}).items())])
        for layer in made.factorized
    }
    return {"macs": made.after.macs, "params": made.after.params, **chosen}


def read() -> dict[str, dict[str, dict[str, Found]]]:
    """Return the plans that were made when ranks were last changed on purpose: by network, rule and case."""
    found: dict[str, dict[str, dict[str, Found]]] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    made = {}
    for net_name in NETS:
        subject = Subject(net_name)
        made[net_name] = {rule: subject.plans(rule) for rule in RULES}
    FILE.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
