"""Classify MNIST at 14x14 pixels by a matrix product state: plain gradients, and sweeps that choose the bonds.

    python -m benchmarks.mps_mnist.run [--data FOLDER] [--runs FOLDER] [--only VARIANT] [--seed N] [--report]

Data: MNIST's Parquet files, see tenfold/tasks/mnist14.py. Every epoch and every sweep is kept in the folder of the
runs, so that a run that was killed goes on; what is finished is not trained again. Weights after the last one are
tested, once.
"""

from __future__ import annotations

import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.trials import Row, Trials, curve_of, finished, tuned
from tenfold.networks import MPSClassifier, SweepConfig, train_by_sweeps
from tenfold.tasks import Task, load_task
from tenfold.training import TuneConfig

HERE = Path(__file__).parent
SOURCE = {10: "about 5 %", 20: "about 2 %", 120: "0.97 %"}


def main() -> None:
    """Train what is not trained yet, and write JSON and Markdown."""
    trials = Trials.read("mps_mnist", __doc__, HERE)
    for variant, seed in trials.wanted():
        method = by_sweeps if variant.startswith("sweeps") else by_gradients
        task = load_task(f"mnist14:{variant.replace('sweeps', 'mps')}", data=trials.options.data, seed=seed)
        folder = trials.folder(variant, seed)
        print(json.dumps(finished(folder, partial(method, task, trials.config, folder))), flush=True)
    trials.write(table)


def by_gradients(task: Task, config: Row, folder: Path) -> Row:
    """Return curve and scores of a run of AdamW on distorted images."""
    tuning = TuneConfig(**config["gradients"], optimizer="adamw", autocast="off", seed=task.seed)
    model, result = tuned(task, tuning, folder, f"{task.id} {config['gradients']}")
    return {"method": "gradients", **row(task, model, curve_of(result))}


def by_sweeps(task: Any, config: Row, folder: Path) -> Row:
    """Return curve and scores of sweeps over pairs of sites, on the images as they are."""
    batches = task.train_batches(0, batch_size=1000, seed=task.seed, hold_out=True)
    inputs = torch.cat([task.transform.prepare(task.train_set.inputs[part]) for part in batches.order.split(1000)])
    labels = task.train_set.labels[batches.order]
    largest = max(task.build().bonds)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(task.seed)
        model = MPSClassifier(inputs.shape[1], 10, 10, features="trigonometric")
        model.start_(inputs[:500])
    settings = SweepConfig(**config["sweeps"], bonds=largest, seed=task.seed)
    validated = partial(task.evaluate, split="validation")
    records = train_by_sweeps(model, inputs, labels, settings, evaluate=validated, folder=folder / "sweeps")
    curve = [{"epoch": r.sweep, "loss": r.cost, "score": r.score, "seconds": r.seconds} for r in records]
    return {"method": "sweeps", "dropped": [r.dropped for r in records], **row(task, model, curve)}


def row(task: Any, model: Any, curve: list[Row]) -> Row:
    """Return what is known of a trained model."""
    start = time.process_time()
    test = task.evaluate(model, batch_size=500)
    return {
        "variant": task.variant,
        "seed": task.seed,
        "params": sum(p.numel() for p in model.parameters()),
        "macs": model.macs(),
        "bonds": list(model.bonds),
        "validation": curve[-1]["score"],
        "test": test,
        "test_seconds": time.process_time() - start,
        "seconds": sum(epoch["seconds"] for epoch in curve),
        "curve": curve,
    }


def table(result: Row) -> str:
    """Return the Markdown page."""
    config, runs, env = result["config"], result["runs"], result["environment"]
    lines = [HEAD.format(torch=env["torch"], device=env["device_name"] or "the CPU", **config)]
    kinds = dict.fromkeys((run["method"], run["variant"]) for run in runs)
    for method, variant in kinds:
        own = [run for run in runs if (run["method"], run["variant"]) == (method, variant)]
        most = max(max(run["bonds"]) for run in own)
        mean = statistics.mean(statistics.mean(run["bonds"]) for run in own)
        cells = [method, f"{most} ({mean:.1f})", f"{own[0]['params']:,}", f"{own[0]['macs'] / 1e6:.2f} M"]
        cells += [percent([1 - run[part] for run in own]) for part in ("test", "validation")]
        cells += [f"{statistics.mean(run['seconds'] for run in own) / 60:.1f}", SOURCE.get(most, "")]
        cells += [", ".join(str(run["seed"]) for run in own)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "## Learning curves",
        "",
        CURVES,
        "",
        "| training | bonds | seed | by epoch or sweep |",
        "|---|---:|---:|---|",
    ]
    for run in runs:
        steps = ", ".join(f"{e['loss']:.3f} / {100 - 100 * e['score']:.2f}" for e in run["curve"])
        lines.append(f"| {run['method']} | {max(run['bonds'])} | {run['seed']} | {steps} |")
    return "\n".join(lines) + "\n"


def percent(values: list[float]) -> str:
    """Return mean and standard deviation in per cent."""
    mean = f"{100 * statistics.mean(values):.2f}"
    return f"{mean} %" if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.2f} %"


HEAD = """\
# A matrix product state over MNIST at 14×14 pixels

`python -m benchmarks.mps_mnist.run`, on {device}, torch {torch}, one thread of a shared machine. 54,000 images for
training, 6,000 for validation, the whole test set. *Gradients*: features 1 − x and x, AdamW on distorted images,
cross-entropy, {gradients[epochs]} epochs, batches of {gradients[batch_size]}, learning rate {gradients[lr]}.
*Sweeps*: cosine and sine, pairs of sites in turn, each solved by conjugate gradients and split again by an SVD,
images as they are, {sweeps[sweeps]} sweeps on {sweeps[samples]:,} images each, cost {sweeps[cost]}. Weights after the
last epoch or sweep; nothing was chosen on the test set. The source (Stoudenmire & Schwab 2016) has sweeps, squared
cost and cosine and sine.

| training | largest bond (mean) | parameters | MACs | test error | validation | minutes | source, same bond | seeds |
|---|---:|---:|---:|---:|---:|---:|---:|---|"""
CURVES = "Mean cost in training / error on the validation part in per cent."


if __name__ == "__main__":
    main()
