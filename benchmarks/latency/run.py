"""Plan well-known networks for a latency budget and measure what comes of it: the models, and every layer.

    python -m benchmarks.latency.run [--config FILE] [--out FOLDER] [--threads N] [--only TEXT] [--keep]

Needs a machine that does nothing else: the load before each run is in the result. Writes ``latency.json`` and
``latency.md`` after each run; ``--only resnet18`` does the runs whose name has that text, ``--keep`` keeps the other
rows of an earlier result. Fails if a run misses what its line of the configuration demands, or any layer is slower.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from benchmarks.zoo import Subject, build
from tenfold.planning import FastPlan, LatencySearch, plan_within_latency, tabulate
from tenfold.planning.target import Target
from tenfold.profiling import (
    Comparison,
    LatencyTable,
    best_memory_format,
    compare_latency,
    environment,
    profile,
    to_memory_format,
)
from tenfold.records import LayerPlan, Profile, Recipe, Speedup
from tenfold.runtime import Runtime
from tenfold.surgery import apply, fuse_batchnorm

HERE = Path(__file__).parent
HEAD = """\
# Latency budgets, measured

`python -m benchmarks.latency.run` on {device}, torch {torch}, Python {python}, float32. Weights
random with a decaying spectrum; the time does not depend on them. Dense models run in the memory format that is best
for them, so do the small ones. *Budget*: share of the dense model's time; *fused*: planned and demanded of both models
with batch norm fused into the layers, the dense one too. *Speed-up*: median of the ratios of rounds in turns, with its
95 % interval. *Per MACs*: speed-up divided by the reduction of multiply-accumulates. *Layers*: how many are factorized,
and how many were sent back because they measured no faster. A plan for fused models has two rows: the models as they
run then, and the same two with batch norm left in place.

| network | batch | threads | budget | dense ms | small ms | speed-up | MACs | per MACs | layers | load | demanded |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|
"""
LAYERS = """
## {name}, batch {batch}, {threads} threads{fused}: layers

| layer | geometry | now | dense ms | factorized ms | speed-up |
|---|---|---|---:|---:|---:|
"""


def main() -> None:
    """Do all runs, write the results after each, and fail if one misses its demands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "latency.yaml")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="text in the names of the runs to do")
    parser.add_argument("--keep", action="store_true", help="keep the other rows of an earlier result")
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    config = yaml.safe_load(options.config.read_text())
    target = options.out / "latency.json"
    rows: list[dict[str, Any]] = json.loads(target.read_text())["rows"] if options.keep and target.is_file() else []
    options.out.mkdir(parents=True, exist_ok=True)
    for wanted in config["runs"]:
        if options.only not in wanted["name"]:
            continue
        torch.set_num_threads(wanted.get("threads", options.threads))
        row = measure(wanted, config)
        rows = [r for r in rows if _place(r) != _place(row)] + [row]
        made = json.loads(environment().to_json())
        result = {"benchmark": "latency", "config": config, "rows": rows, "environment": made}
        target.write_text(json.dumps(result, indent=2) + "\n")
        (options.out / "latency.md").write_text(table(result))
        print(*lines(row), sep="\n", flush=True)
    if not all(row["as_demanded"] for row in rows):
        raise SystemExit(1)


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["name"], row["batch"], row.get("fuse", False), row["threads"]


def measure(wanted: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return one row: the plan for a network, the model that it makes measured against the dense one, its layers."""
    load, start = os.getloadavg()[0], time.perf_counter()
    subject = build(wanted["name"], batch=wanted["batch"], seed=config["seed"])
    decay_(subject.model, config["decay"])
    cost = profile(subject.model, subject.inputs)
    found = planned(subject, cost, wanted, config)
    small = apply(subject.model, found.plan.replace(fused={}))
    after = profile(small, subject.inputs)
    plain = compared(subject.model, small, subject.inputs, found, config)
    ran = plain
    if wanted.get("fuse"):
        dense, slim = (fuse_batchnorm(model, subject.inputs) for model in (subject.model, small))
        ran = compared(dense, slim, subject.inputs, found, config)
    speedup = ran.speedups["small"]
    per_macs = speedup.ratio * after.macs / cost.macs
    as_demanded = (
        speedup.ratio >= wanted.get("speedup", 1.0)
        and speedup.low >= 1.0
        and per_macs >= wanted.get("per_macs", 0.0)
        and all(timing.faster() for timing in found.layers.values())
    )
    return {
        "name": subject.name,
        "batch": wanted["batch"],
        "threads": torch.get_num_threads(),
        "fuse": wanted.get("fuse", False),
        "fused_norms": len(found.plan.fused),
        "budget": wanted["latency"],
        "demanded": {k: wanted[k] for k in ("speedup", "per_macs") if k in wanted},
        "as_demanded": as_demanded,
        "met": found.met,
        **figures(ran),
        "unfused": figures(plain) if wanted.get("fuse") else None,
        "macs": [cost.macs, after.macs],
        "params": [cost.params, after.params],
        "per_macs": per_macs,
        "rounds": found.rounds,
        "layers": [layer_row(layer, cost, found) for layer in found.plan.layers if cost.layer(layer.path).spec],
        "load": load,
        "seconds": round(time.perf_counter() - start, 1),
    }


def compared(dense: nn.Module, small: nn.Module, inputs: Any, found: FastPlan, config: dict[str, Any]) -> Comparison:
    """Return two models measured in turns, each in the memory format that was chosen for it."""
    models = {"dense": (dense, found.before.memory_format), "small": (small, found.after.memory_format)}
    variants = {name: to_memory_format(model, inputs, layout) for name, (model, layout) in models.items()}
    return compare_latency(variants, seconds=config["final_seconds"])


def figures(result: Comparison) -> dict[str, Any]:
    """Return what was measured, as plain values."""
    times = {name: latency.model_dump() for name, latency in result.latencies.items()}
    return times | {"speedup": result.speedups["small"].model_dump()}


def planned(subject: Subject, cost: Profile, wanted: dict[str, Any], config: dict[str, Any]) -> FastPlan:
    """Return the plan for the latency budget, as near to it as the layers allow."""
    runs = fuse_batchnorm(subject.model, subject.inputs) if wanted.get("fuse") else subject.model
    layout, _ = best_memory_format(runs, subject.inputs, seconds=config["model_seconds"] / 2)
    recipe = Recipe(
        budget={"latency": wanted["latency"]},
        formats=config["formats"],
        fuse_batchnorm=wanted.get("fuse", False),
        seed=config["seed"],
    )
    table = tabulate(subject.model, cost, recipe)
    clock = LatencyTable(memory_format=layout, seconds=config["clock_seconds"])
    target = Target.of(recipe, subject.model, subject.inputs, Runtime(clock=clock))
    search = LatencySearch(
        strict=False,
        rounds=config["rounds"],
        seconds=config["model_seconds"],
        layer_seconds=config["layer_seconds"],
    )
    return plan_within_latency(subject.model, table, subject.inputs, target, search)


def decay_(model: nn.Module, decay: float) -> None:
    """Give all weights a spectrum that falls in both channel modes, in place."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = module.weight.data
            for axis in (0, 1):
                shape = [1] * weight.dim()
                shape[axis] = -1
                weight.mul_(torch.arange(1.0, weight.shape[axis] + 1).pow(-decay).reshape(shape))


def layer_row(layer: LayerPlan, cost: Profile, found: FastPlan) -> dict[str, Any]:
    """Return what happens to one layer, with both times where it is factorized or was sent back."""
    timing = found.layers.get(layer.path) or found.returned.get(layer.path)
    rank = ",".join(f"{k}={v}" for k, v in (layer.rank or {}).items())
    return {
        "path": layer.path,
        "kind": layer.kind,
        "now": f"{layer.format} {rank}" if layer.action == "factorize" else f"dense: {layer.reason}",
        "factorized": layer.action == "factorize",
        "sent_back": layer.path in found.returned,
        "macs": [layer.before.macs, layer.after.macs],
        "in_shape": [list(call.in_shape) for call in cost.layer(layer.path).calls],
        "timing": None if timing is None else vars(timing),
    }


def table(result: dict[str, Any]) -> str:
    """Return the rows, and the layers of each, as Markdown."""
    env = result["environment"]
    text = HEAD.format(device=env["device_name"] or env["device"], torch=env["torch"], python=env["python"])
    text += "".join(f"{line}\n" for row in result["rows"] for line in lines(row))
    slower = [
        lay for row in result["rows"] for lay in row["layers"] if lay["factorized"] and lay["timing"]["ratio"] < 1
    ]
    total = sum(lay["factorized"] for row in result["rows"] for lay in row["layers"])
    text += f"\nOf {total} factorized layers in these plans, {len(slower)} measure slower than their dense originals.\n"
    for row in result["rows"]:
        fused = ", fused" if row.get("fuse") else ""
        text += LAYERS.format(name=row["name"], batch=row["batch"], threads=row["threads"], fused=fused) + "".join(
            layer_line(layer) for layer in row["layers"]
        )
    return text


def lines(row: dict[str, Any]) -> list[str]:
    """Return one network as a line of the table; two where its plan is for fused models."""
    demanded = ", ".join(f"{k} ≥ {v}" for k, v in row["demanded"].items()) or "not slower"
    verdict = f"{demanded}: {'yes' if row['as_demanded'] else '**no**'}"
    if not row.get("fuse"):
        return [line(row, f"{row['budget']:.0%}", verdict)]
    return [line(row, f"{row['budget']:.0%} fused", verdict), line(row | row["unfused"], "the same, not fused", "")]


def line(row: dict[str, Any], budget: str, verdict: str) -> str:
    """Return measured figures as a line of the table."""
    speedup, layers = row["speedup"], row["layers"]
    cells = [
        row["name"].partition(":")[2],
        row["batch"],
        row["threads"],
        budget,
        f"{row['dense']['median_ms']:.1f} ({row['dense']['memory_format']})",
        f"{row['small']['median_ms']:.1f} ({row['small']['memory_format']})",
        Speedup(**speedup).in_doubt or f"{speedup['ratio']:.2f} [{speedup['low']:.2f}–{speedup['high']:.2f}]",
        f"÷ {row['macs'][0] / row['macs'][1]:.2f}",
        f"{speedup['ratio'] * row['macs'][1] / row['macs'][0]:.2f}",
        f"{sum(lay['factorized'] for lay in layers)}, {sum(lay['sent_back'] for lay in layers)} of {len(layers)}",
        f"{row['load']:.1f}",
        verdict,
    ]
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def layer_line(layer: dict[str, Any]) -> str:
    """Return one layer as a line of its table."""
    timing = layer["timing"]
    times = ["", "", ""]
    if timing is not None:
        interval = f"{timing['ratio']:.2f} [{timing['low']:.2f}–{timing['high']:.2f}]"
        times = [f"{timing['before_ms']:.3f}", f"{timing['after_ms']:.3f}", interval]
    return f"| {layer['path']} | {layer['kind']} | {layer['now']} | {' | '.join(times)} |\n"


if __name__ == "__main__":
    main()
