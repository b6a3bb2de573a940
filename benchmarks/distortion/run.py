"""Predicted against actual loss over random plans: how well four models of distortion rank what compression does.

    python -m benchmarks.distortion.run --weights-dir FOLDER [--config FILE] [--threads N]

Every layer gets a format at random, or none, and a random part of its cost; all parts are then scaled to the budget by
one number. No model of distortion has a say in that. Writes ``distortion.json`` and ``distortion.md`` after each plan;
plans that are in the result already are not repeated. Draw the points with ``python -m benchmarks.distortion.plot``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import yaml
from scipy.stats import rankdata, spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.allocation import RULES, Accounts, Choice, Factorize, Keep, ThresholdRule
from tenfold.calibration import calibrate, called_layers
from tenfold.calibration.gradients import collect_gradients
from tenfold.decompositions import Moments, decompose
from tenfold.errors import BudgetError
from tenfold.planning import tabulate
from tenfold.profiling import environment, profile
from tenfold.records import Budget, FormatOptions, LayerOptions, OptionTable, Recipe
from tenfold.tasks import load_task

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
MODELS = {
    "weight": "weight: ‖W−Ŵ‖²/‖W‖²",
    "output": "layer's output: E‖y−ŷ‖²/E‖y−ȳ‖²",
    "fisher": "Fisher: tr(GΔCΔᵀ), G of the model's own predictions",
    "outputs": "network's outputs: tr(GΔCΔᵀ), G of the logits (default)",
}
ACTUAL = {"kl": "KL divergence from the dense model", "loss": "increase of the cross-entropy"}
HEAD = """\
# Models of distortion: predicted against actual loss

`python -m benchmarks.distortion.run` on {device}, torch {torch}, Python {python}, {threads} thread(s), seed {seed}.
ResNet-20 on CIFAR-10; {samples:,} training images without labels to predict from, {held_out:,} others to measure the
loss on. Each layer is factorized on its own (least distortion of the network's outputs), the shift of its mean goes
into the batch norm that follows. Spearman's rank correlation between the predicted distortion, summed over layers, and
what came; with the 95 % interval of 2,000 bootstrap samples. No model of distortion has a say in the plans: each layer
gets a format at random, or stays (chance {dense:.0%}), and keeps level^exp({spread}·normal) of its cost, with one
level for the budget. Plans were drawn wilder at first (25 % stay, spread 1.0): a dozen of these showed networks at
chance, where more distortion makes no difference, so the draw was narrowed. The configuration has the wilder ones as a
set of their own.
"""


def main() -> None:
    """Try the plans that are missing and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights-dir", type=Path, required=True, help="folder with the dense weights")
    parser.add_argument("--config", type=Path, default=HERE / "distortion.yaml")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = yaml.safe_load(options.config.read_text())
    target = RESULTS / f"{options.config.stem}.json"
    rows: list[dict[str, Any]] = json.loads(target.read_text())["rows"] if target.is_file() else []
    asked = [(wanted, i) for wanted in config["sets"] for i in range(wanted["plans"])]
    there = {(row["set"], row["plan"]) for row in rows}
    trial = Trial(config, options.weights_dir)
    for wanted, i in asked:
        if (wanted["name"], i) in there:
            continue
        rows.append(trial.row(wanted, i))
        made = json.loads(environment().to_json())
        result = {"benchmark": "distortion", "config": config, "rows": rows, "environment": made}
        RESULTS.mkdir(exist_ok=True)
        target.write_text(json.dumps(result, indent=1) + "\n")
        target.with_suffix(".md").write_text(table(result))
        print(rows[-1]["set"], i, {k: round(rows[-1][k], 4) for k in ("macs", "kl", "loss", *MODELS)}, flush=True)


@RULES.register("random")
@dataclass(frozen=True)
class RandomRanks(ThresholdRule):
    """A random format for every layer, or none, at a random part of its cost that rises with the level.

    Attributes:
        draw: seed of the draw.
        spread: of the parts of the layers.
        dense: chance of a layer to stay as it is.
    """

    draw: int = 0
    spread: float = 0.5
    dense: float = 0.1

    rows: ClassVar[str] = "saving"
    by_name: ClassVar[bool] = True  # ranks stay as they are in the family, also where a fuller one is cheaper

    @property
    def columns(self) -> tuple[str, ...]:
        """The distortion, which has no say in the choice but is to be compared with what came."""
        return ("distortion",)

    def level(self) -> float | None:
        """Return None: a budget sets it."""
        return None

    def note(self, level: float) -> str:
        """Return why there is this option."""
        del level
        return "drawn"

    def row(self, layer: LayerOptions, options: FormatOptions, level: float) -> int | None:
        """Return the option of most multiplications within a part of the layer's."""
        (fitting,) = np.nonzero(options.macs <= level * layer.before.macs)
        return int(fitting[-1]) if len(fitting) else 0

    def choose(self, layer: LayerOptions, level: float) -> Choice:
        """Return the largest rank of the drawn format within the drawn part."""
        rng = np.random.default_rng([self.draw, *layer.path.encode()])
        stays, format = rng.random() < self.dense, rng.choice([options.format for options in layer.options])
        part = level ** math.exp(self.spread * rng.standard_normal())
        if stays:
            return Keep("drawn")
        first = 1
        for options in layer.options:
            if options.format == format:
                return Factorize(first + (self.row(layer, options, part) or 0), self.note(level))
            first += len(options)
        raise AssertionError(format)


class Trial:
    """A trained network, what the models of distortion say of its layers, and a way to see what happens."""

    def __init__(self, config: dict[str, Any], weights_dir: Path) -> None:
        self.config, self.seed = config, int(config["seed"])
        task = load_task(config["task"], seed=self.seed)
        self.model = task.dense(weights_dir / config["weights"]).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.profile = profile(self.model, task.example_inputs())
        sizes = config["calibration"]
        batches = list(task.calibration_batches(sizes["samples"], batch_size=sizes["batch_size"], seed=self.seed))
        specs = {k: v for k, v in called_layers(self.profile).items() if k not in config["keep"]}
        self.moments = calibrate(self.model, batches, specs, seed=self.seed)
        fisher = collect_gradients(self.model, batches, specs, loss="fisher", seed=self.seed)
        self.tables = {
            "weight": self._table(None),
            "output": self._table({k: m.replace(output_gram=None) for k, m in self.moments.items()}),
            "fisher": self._table({k: m.replace(output_gram=fisher[k]) for k, m in self.moments.items()}),
            "outputs": self._table(self.moments),
        }
        held = list(task.validation_batches(config["held_out"], batch_size=125))
        self.inputs, self.labels = [x for x, _ in held], torch.cat([y for _, y in held])
        self.dense = self._logits(self.model)
        self.known: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def row(self, wanted: dict[str, Any], number: int) -> dict[str, Any]:
        """Return what the models predict for one random plan, and what came."""
        share = wanted["low"] + (wanted["high"] - wanted["low"]) * number / max(wanted["plans"] - 1, 1)
        choices, drawn = self._draw(self.config | wanted, share, 1000 * self.config["sets"].index(wanted) + number)
        rows = {path: choice.row for path, choice in choices.items() if isinstance(choice, Factorize)}
        predicted = {
            name: sum(float(table.layer(path).column("distortion")[row]) for path, row in rows.items())
            for name, table in self.tables.items()
        }
        layers = {path: self.tables["weight"].layer(path).place(row) for path, row in rows.items()}
        pairs = {path: (options.format, options.rank(option)) for path, (options, option) in layers.items()}
        saved = sum(
            self.profile.layer(path).macs - options.cost(option).macs for path, (options, option) in layers.items()
        )
        after = self.profile.macs - saved
        found = self._logits(self._compressed(pairs))
        kl = F.kl_div(found.log_softmax(1), self.dense.log_softmax(1), log_target=True, reduction="batchmean")
        loss = F.cross_entropy(found, self.labels) - F.cross_entropy(self.dense, self.labels)
        plan = {path: {format: rank} for path, (format, rank) in pairs.items()}
        identity = {"set": wanted["name"], "plan": number, "drawn": drawn, "share": share}
        return {**identity, "macs": after / self.profile.macs, "kl": float(kl), "loss": float(loss), **predicted} | {
            "layers": plan
        }

    def _draw(self, how: dict[str, Any], share: float, seed: int) -> tuple[dict[str, Choice], int]:
        """Return a random choice for each layer within the budget, and how many draws before it cannot meet it."""
        table = self.tables["weight"]
        limits = Accounts(table).limits(Budget(macs=share))
        for drawn in range(100):
            rule = RandomRanks(self.seed + seed + 100_000 * drawn, how["spread"], how["dense"])
            try:
                choices = rule.select(table.eligible, limits)
            except BudgetError:
                continue
            return {layer.path: choice for layer, choice in zip(table.eligible, choices, strict=True)}, drawn
        msg = f"no random plan meets {share:.0%} of the MACs"
        raise BudgetError(msg)

    def _table(self, moments: dict[str, Moments] | None) -> OptionTable:
        """Return the ranks of the families with the distortion that the planner predicts, by these moments."""
        recipe = Recipe(rule="random", formats=self.config["formats"], keep=self.config["keep"], keep_ends=False)
        return tabulate(self.model, self.profile, recipe, moments=moments)

    def _compressed(self, pairs: dict[str, tuple[str, dict[str, int]]]) -> nn.Module:
        """Return the model with the approximated weights, the shifts of the means in the batch norms that follow."""
        small: nn.Module = copy.deepcopy(self.model)
        with torch.no_grad():
            for path, (format, rank) in pairs.items():
                conv: Any = small.get_submodule(path)
                norm: Any = small.get_submodule(path.replace("conv", "bn"))
                key = (path, format, *rank.values())
                if key not in self.known:
                    spec, moments = self.profile.layer(path).spec, self.moments[path]
                    fit = decompose(conv.weight, format, rank, spec=spec, moments=moments)
                    shift = torch.zeros(()) if fit.bias_shift is None else fit.bias_shift.float()
                    self.known[key] = (fit.value.to_dense(), shift)
                weight, shift = self.known[key]
                conv.weight.copy_(weight)
                norm.running_mean.sub_(shift)
        return small

    def _logits(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return torch.cat([model(x) for x in self.inputs]).double()


def table(result: dict[str, Any]) -> str:
    """Return the rank correlations of all models as Markdown."""
    config, env = result["config"], result["environment"]
    head = HEAD.format(
        device=env["device_name"] or env["device"],
        torch=env["torch"],
        python=env["python"],
        threads=env["threads"],
        seed=config["seed"],
        samples=config["calibration"]["samples"],
        held_out=config["held_out"],
        dense=config["dense"],
        spread=config["spread"],
    )
    lines = [head.rstrip()]
    for wanted in config["sets"]:
        rows = [row for row in result["rows"] if row["set"] == wanted["name"]]
        if len(rows) < 3:
            continue
        ranges = ", ".join(
            f"{ACTUAL[k]} {min(r[k] for r in rows):.3f} to {max(r[k] for r in rows):.3f}" for k in ACTUAL
        )
        lines += ["", f"## {len(rows)} random plans, {wanted['name']}", "", f"{ranges[0].upper()}{ranges[1:]}.", ""]
        lines += [f"| predicted by | {' | '.join(ACTUAL.values())} |", "|---|---:|---:|"]
        lines += [f"| {title} | {' | '.join(cell(rows, name, k) for k in ACTUAL)} |" for name, title in MODELS.items()]
    return "\n".join(lines) + "\n"


def cell(rows: list[dict[str, Any]], model: str, actual: str) -> str:
    """Return the rank correlation of predicted and actual with its interval."""
    pairs = np.array([[row[model] for row in rows], [row[actual] for row in rows]])
    samples = np.random.default_rng(0).integers(len(rows), size=(2000, len(rows)))
    low, high = np.nanquantile(correlation(*pairs[:, samples]), [0.025, 0.975])
    return f"{spearmanr(*pairs)[0]:.3f} ({low:.2f} to {high:.2f})"


def correlation(x: Any, y: Any) -> Any:
    """Return Spearman's rank correlations along the last axis."""
    x, y = (rankdata(v, axis=-1) - (v.shape[-1] + 1) / 2 for v in (x, y))
    with np.errstate(invalid="ignore"):  # samples of one plan only, while there are few
        return (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))


if __name__ == "__main__":
    main()
