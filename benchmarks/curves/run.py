"""Accuracy against MACs without any fine-tuning: what data, a global budget and sequential fits are worth.

    python -m benchmarks.curves.run --weights-dir FOLDER [--config FILE] [--threads N] [--pilot]

Weights are ``FOLDER/NETWORK.safetensors``. Writes ``curves.json`` and ``curves.md`` after each row; rows that are in
the result already are not repeated. ``--pilot`` instead compares ways to fit single layers, on held-out images.
Draw the curves with ``python -m benchmarks.curves.plot``.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.allocation import choose
from tenfold.calibration import calibrate, called_layers
from tenfold.decompositions import Moments
from tenfold.planning import tabulate
from tenfold.profiling import environment, profile
from tenfold.records import OptionTable, Plan, Recipe
from tenfold.surgery import SequentialFit, apply, apply_sequentially, reestimate_batchnorm_
from tenfold.tasks import load_task

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
METHODS = ("weight-only", "data-aware", "global", "sequential", "cp", "any")
TITLES = {
    "dense": "dense",
    "weight-only": "weight-only",
    "data-aware": "data-aware",
    "global": "data-aware + global budget",
    "sequential": "data-aware + global budget + sequential",
    "cp": "data-aware + global budget + sequential, cp3 alone",
    "any": "data-aware + global budget + sequential, cp3 too",
}
HEAD = """\
# Accuracy at a share of the MACs, without fine-tuning

`python -m benchmarks.curves.run` on {device}, torch {torch}, Python {python}, {threads} thread(s), seed {seed}.
CIFAR-10, top-1 on the whole test set, once per row; nothing was chosen on it. Data: {samples:,} training images without
labels.

* *weight-only*: Tucker-2, the same share of MACs in every layer, by HOOI. {weight-only}.
* *data-aware*: Tucker-2, the same share of MACs in every layer, factors by the data. {data-aware}.
* *global budget*: tucker2, low_rank or spatial and ranks of each layer by the knapsack over predicted distortion.
  {global}.
* *sequential*: the same plan, each layer fitted to the dense layer's output given what now enters it; batch norm keeps
  its statistics but for the shift of the means.
* *cp3*: a 1×1, a depthwise 3×3 and a 1×1 stage, planned and fitted likewise. Not among the default formats: depthwise
  stages are slow on many CPUs, and only a measured clock can tell where they pay.

How the first three fit layers and treat batch norm was chosen on one row (ResNet-20 at 50 %) and held-out training
images, for each of them alone: `curves_pilot.json`. There, re-estimated batch norm takes the global plan from 95.8 % to
91.5 % agreement with the dense model. So where little is compressed, part of the gap to the first two methods may be
batch norm's. Ranks of equal ratio also end up to three points of MACs below the budget.

*Seconds*: plan, factors and batch norm of the row, on a machine shared with other work: a rough guide. The first
plan of a method computes the curves of distortion for all that follow. Calibration is once per network: {calibrations}.
"""
FITTED = {
    "weight": "least error of the weight",
    "about zero": "least error of the layer's output",
    "centred": "least error of the layer's output about its mean, which batch norm takes",
}
NORMS = {"kept": "batch norm stays as it was", "re-estimated": "batch norm re-estimated from the data"}


def main() -> None:
    """Make the rows that are missing and write the results after each; or compare the ways to fit layers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights-dir", type=Path, required=True, help="folder with NETWORK.safetensors")
    parser.add_argument("--config", type=Path, default=HERE / "curves.yaml")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pilot", action="store_true", help="compare ways to fit single layers, on held-out images")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = yaml.safe_load(options.config.read_text())
    if options.pilot:
        write_pilot(config, options.weights_dir, RESULTS / f"{options.config.stem}_pilot.json")
        return
    target = RESULTS / f"{options.config.stem}.json"
    result: dict[str, Any] = {"benchmark": "curves", "networks": {}, "rows": []}
    result |= json.loads(target.read_text()) if target.is_file() else {}
    networks: dict[str, Network] = {}
    for name, share, method in wanted(config, result["rows"]):
        if name not in networks:
            networks[name] = Network(name, config, options.weights_dir)
            result["networks"][name] = networks[name].reference
        result["rows"].append(networks[name].row(method, share))
        result |= {"config": config, "environment": json.loads(environment().to_json())}
        RESULTS.mkdir(exist_ok=True)
        target.write_text(json.dumps(result, indent=1) + "\n")
        target.with_suffix(".md").write_text(table(result))
        print(name, line(result["rows"][-1]), flush=True)


def wanted(config: dict[str, Any], rows: list[dict[str, Any]]) -> list[tuple[str, float, str]]:
    """Return network, share and method of the rows that are missing, in the order of the configuration."""
    there = {(row["network"], row["share"], row["method"]) for row in rows}
    asked = [(r["network"], share, method) for r in config["runs"] for share in r["shares"] for method in r["methods"]]
    return [row for row in asked if row not in there]


class Network:
    """A trained network with what data say of it, and the option tables that its plans are chosen from."""

    def __init__(self, name: str, config: dict[str, Any], weights_dir: Path) -> None:
        self.name, self.config, self.seed = name, config, int(config["seed"])
        self.task = load_task(f"{config['task']}:{name}", seed=self.seed)
        self.model = self.task.dense(weights_dir / f"{name}.safetensors").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.profile = profile(self.model, self.task.example_inputs())
        sizes = config["calibration"]
        batches = self.task.calibration_batches(sizes["samples"], batch_size=sizes["batch_size"], seed=self.seed)
        self.batches = list(batches)
        start = time.perf_counter()
        self.moments = calibrate(self.model, self.batches, called_layers(self.profile), seed=self.seed)
        seconds = time.perf_counter() - start
        self.tables: dict[str, OptionTable] = {}
        cost = self.profile
        top1 = self.task.evaluate(self.model)
        self.reference = {"macs": cost.macs, "params": cost.params, "top1": top1, "calibration_seconds": seconds}
        print(name, f"dense {top1:.2%}, calibrated in {seconds:.0f} s", flush=True)

    def row(self, method: str, share: float) -> dict[str, Any]:
        """Return cost and accuracy of one method at one share of the MACs."""
        start = time.perf_counter()
        plan = self.plan(method, share)
        planned = time.perf_counter()
        small = self.apply(method, plan)
        applied = time.perf_counter()
        after = profile(small, self.task.example_inputs())
        return {
            "network": self.name,
            "method": method,
            "share": share,
            "macs": after.macs / self.profile.macs,
            "params": after.params / self.profile.params,
            "top1": self.task.evaluate(small),
            "seconds": {"plan": round(planned - start, 1), "apply": round(applied - planned, 1)},
            "formats": formats_in(plan),
        }

    def plan(self, method: str, share: float) -> Plan:
        """Return the plan of a method: ranks by the same ratio everywhere, or those that hurt the outputs least."""
        recipe = Recipe(
            budget={"macs": share},
            rule="ratio" if method in ("weight-only", "data-aware") else "global",
            formats=self.config["methods"][method]["formats"],
            seed=self.seed,
        )
        if method not in self.tables:
            moments = None if method == "weight-only" else self.moments
            self.tables[method] = tabulate(self.model, self.profile, recipe, moments=moments)
        return choose(self.tables[method], recipe)

    def apply(self, method: str, plan: Plan) -> nn.Module:
        """Return the model that a method makes of a plan, with the batch norms that belong to it."""
        if "fit" not in self.config["methods"][method]:
            grams = {path: own.output_gram for path, own in self.moments.items() if own.output_gram is not None}
            return apply_sequentially(
                self.model, plan, self.batches, output_grams=grams, config=SequentialFit(seed=self.seed)
            )
        how = self.config["methods"][method]
        small = apply(self.model, plan, moments=self.fitted(how["fit"]))
        if how["norms"] == "re-estimated":
            reestimate_batchnorm_(small, self.batches)
        return small

    def fitted(self, how: str) -> dict[str, Moments] | None:
        """Return moments by which ``apply`` fits: none, as they come, or centred for layers without a bias, too.

        Without a bias ``apply`` counts the mean of the output's error, which nothing in the layer could take. A batch
        norm that is estimated anew does take it: moments with the mean already subtracted say so.
        """
        if how != "centred":
            return None if how == "weight" else self.moments
        bare = {path for path in self.moments if getattr(self.model.get_submodule(path), "bias", None) is None}
        return {
            path: own.replace(input_second_moment=own.covariance(), mean=torch.zeros_like(own.mean))
            if path in bare
            else own
            for path, own in self.moments.items()
        }

    def shift_means_(self, small: nn.Module, plan: Plan) -> None:
        """Let each batch norm take the shift of the mean of the factorized layer before it (``bn1`` of ``conv1``)."""
        for layer in plan.factorized:
            layers: list[Any] = [m.get_submodule(layer.path) for m in (self.model, small)]
            old, new = (found.weight.detach().double().flatten(1)[None] for found in layers)
            norm: Any = small.get_submodule(layer.path.replace("conv", "bn"))
            norm.running_mean.sub_(self.moments[layer.path].bias_shift(old, new)[0].float())


def formats_in(plan: Plan) -> dict[str, int]:
    """Return how many layers have which format; ``dense`` for those that stay."""
    names = [layer.format or "dense" for layer in plan.layers if layer.before.macs]
    return {name: names.count(name) for name in sorted(set(names))}


def write_pilot(config: dict[str, Any], weights_dir: Path, target: Path) -> None:
    """Compare ways to fit layers one by one on one row, on held-out training images, and write what came."""
    network = Network(config["pilot"]["network"], config, weights_dir)
    held = list(network.task.validation_batches(batch_size=125))
    dense = logits(network.model, held)
    rows = []
    for method, how in ((m, f) for m in METHODS[:3] for f in FITTED if (m == "weight-only") == (f == "weight")):
        plan = network.plan(method, config["pilot"]["share"])
        plain = apply(network.model, plan, moments=network.fitted(how))
        for norms in ("kept", "means shifted", "re-estimated"):
            small = copy.deepcopy(plain)
            if norms == "means shifted":
                network.shift_means_(small, plan)
            elif norms == "re-estimated":
                reestimate_batchnorm_(small, network.batches)
            found = logits(small, held)
            kl = F.kl_div(found.log_softmax(1), dense.log_softmax(1), log_target=True, reduction="batchmean")
            same = float((found.argmax(1) == dense.argmax(1)).double().mean())
            rows.append({"method": method, "fit": how, "batch_norm": norms, "kl": float(kl), "same_class": same})
            print(rows[-1], flush=True)
    made = json.loads(environment().to_json())
    result = {"benchmark": "curves_pilot", **config["pilot"], "samples": len(dense), "rows": rows, "environment": made}
    target.write_text(json.dumps(result, indent=1) + "\n")


def logits(model: nn.Module, batches: list[tuple[Any, Tensor]]) -> Tensor:
    """Return the outputs of a model on labelled batches, in float64."""
    with torch.no_grad():
        return torch.cat([model(inputs) for inputs, _ in batches]).double()


def table(result: dict[str, Any]) -> str:
    """Return all rows as Markdown, by network, share and method."""
    config, env = result["config"], result["environment"]
    times = ", ".join(f"{name} {found['calibration_seconds']:.0f} s" for name, found in result["networks"].items())
    treated = {name: how for name, how in config["methods"].items() if "fit" in how}
    head = HEAD.format(
        device=env["device_name"] or env["device"],
        torch=env["torch"],
        python=env["python"],
        threads=env["threads"],
        seed=config["seed"],
        samples=config["calibration"]["samples"],
        calibrations=times,
        **{name: f"{FITTED[how['fit']]}; {NORMS[how['norms']]}".capitalize() for name, how in treated.items()},
    )
    lines = [head.rstrip()]
    for name, dense in result["networks"].items():
        rows = [row for row in result["rows"] if row["network"] == name]
        rows.sort(key=lambda row: (row["share"], METHODS.index(row["method"])))
        lines += ["", f"## {name}", ""]
        lines += ["| method | MACs | params | top-1 | seconds |", "|---|---:|---:|---:|---:|"]
        lines += [f"| dense | 100.0 % | 100.0 % | {100 * dense['top1']:.2f} % | |", *(line(row) for row in rows)]
    return "\n".join(lines) + "\n"


def line(row: dict[str, Any]) -> str:
    """Return one row of the table; shares are those of the dense network."""
    cells = [f"{100 * row[name]:.{digits}f} %" for name, digits in (("macs", 1), ("params", 1), ("top1", 2))]
    return f"| {TITLES[row['method']]} | {' | '.join(cells)} | {sum(row['seconds'].values()):.0f} |"


if __name__ == "__main__":
    main()
