"""Replace the head of a small VGG, a flattened map and two linear layers, by a tensor regression.

    python -m benchmarks.tensor_regression.run [--data FOLDER] [--runs FOLDER] [--seed N] [--tune] [--report]
                                               [--weights cifar10_resnets/resnet20.safetensors]

Data: CIFAR-10's Parquet files, see tenfold/tasks/cifar10.py; the weights are those of a ResNet-20 with a head behind a
global pooling. Every epoch is kept in the folder of the runs, so that a run that was killed goes on. The test set gives
the scores and nothing else: data of calibration are training samples.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tenfold
from benchmarks.tensor_regression.vgg import SmallVGG
from benchmarks.trials import Row, Trials, finished
from tenfold.layers import CPRegression, TTRegression, TuckerRegression
from tenfold.surgery.separate_map import flattened_maps, separate_map_
from tenfold.tasks import load_task
from tenfold.tracing import copied
from tenfold.training import TrainingFolder, TuneConfig, finetune

HERE = Path(__file__).parent


def main() -> None:
    """Train and replace what is not done yet, and write JSON and Markdown."""
    trials = Trials.read(
        "tensor_regression", __doc__, HERE, tune="train the replaced heads, and the dense networks, on"
    )
    for _, seed in trials.wanted():
        task = SmallVGG(data=trials.options.data, seed=seed)
        print(json.dumps(finished(trials.folder("seed", seed), partial(measured, task, trials))), flush=True)
        for name in ("head", "dense") if trials.options.tune else ():
            row = finished(trials.folder(f"tuned-{name}", seed), partial(tuned, name, task, trials))
            print(json.dumps(row), flush=True)
    weights = trials.options.weights
    more = {} if weights is None else {"pooled": pooled(weights, trials.options.data)}
    files = sorted(trials.options.runs.glob("tuned-*/run.json"))
    trials.write(table, tuned=[json.loads(file.read_text()) for file in files], **more)


def measured(task: SmallVGG, trials: Trials) -> Row:
    """Return the scores of one seed: dense, and with its head replaced."""
    dense = dense_of(task, trials)
    rows = []
    for choice, share, (small, plan), row in replaced(dense, task, trials.config):
        rows.append({"choice": choice, "share": share, **row, "test": task.evaluate(small)})
        print(json.dumps(rows[-1]), flush=True)
        if (choice, share) == (trials.config["tuned"]["choice"], trials.config["tuned"]["share"]):
            tenfold.save(small, plan, folder_of(task, trials))
    return {"seed": task.seed, "test": task.evaluate(dense), "head_params": head(dense), "replaced": rows}


def dense_of(task: SmallVGG, trials: Trials) -> nn.Module:
    """Return the trained dense network of a seed."""
    return trained(task, task.build(), trials.config["dense"], trials.options.runs / f"dense-{task.seed}")


def folder_of(task: SmallVGG, trials: Trials) -> Path:
    """Return where the network with the head to be trained is kept."""
    folder: Path = trials.options.runs / f"small-{task.seed}"
    return folder


def tuned(name: str, task: SmallVGG, trials: Trials) -> Row:
    """Return the score of a network after further epochs: ``dense``, or that with its ``head`` replaced."""
    chosen = {key: value for key, value in trials.config["tuned"].items() if key not in ("choice", "share")}
    model = dense_of(task, trials) if name == "dense" else tenfold.load(task.build(), folder_of(task, trials))[0]
    model = trained(task, model, chosen, trials.options.runs / f"more-{name}-{task.seed}")
    return {"seed": task.seed, "network": name, "test": task.evaluate(model)}


def trained(task: SmallVGG, model: nn.Module, chosen: Row, folder: Path) -> nn.Module:
    """Return the model, trained in place; the validation part is held out."""
    tuning = TuneConfig(**chosen, autocast="off", seed=task.seed)
    finetune(
        model,
        partial(task.train_batches, batch_size=tuning.batch_size, seed=task.seed, hold_out=True),
        tuning,
        evaluate=partial(task.evaluate, split="validation"),
        folder=TrainingFolder(folder, f"vgg {task.seed} {chosen}"),
    )
    return model.eval()


def replaced(dense: nn.Module, task: SmallVGG, config: Row) -> Iterator[tuple[str, float, tuple[nn.Module, Any], Row]]:
    """Yield choice, share, and the network whose head has at most this share of its parameters, with its plan."""
    x = task.example_inputs(1)
    source = separate_map_(copied(dense), flattened_maps(dense, x))
    cost = tenfold.profile(source, x)
    layers = {layer.path: layer.spec for layer in cost.layers if layer.path.startswith("1.") and layer.spec is not None}
    data = task.calibration_batches(config["calibration"], batch_size=250, seed=task.seed)
    moments = tenfold.calibrate(source, data, layers, seed=task.seed)
    for choice, formats in config["choices"].items():
        recipe: Row = {"formats": formats, "keep_ends": False, "seed": task.seed, "keep": "0.*"}
        table = tenfold.tabulate(source, cost, recipe, moments=moments)
        for share in config["shares"]:
            # Of the whole network, which besides the head stays as it is.
            left = cost.params - round((1 - share) * head(dense))
            try:
                plan = tenfold.choose(table, tenfold.Recipe.of(recipe | {"budget": f"max_params={left}"}))
            except tenfold.errors.BudgetError:
                continue  # its options end above
            small = tenfold.apply(source, plan, moments=moments)
            lines = [layer for layer in plan.layers if layer.format]
            words = [
                f"{line.path}: {line.format} " + " ".join(f"{k}={v}" for k, v in line.rank.items()) for line in lines
            ]
            yield choice, share, (small, plan), {"params": head(small), "plan": words}


def head(model: nn.Module) -> int:
    """Return the number of parameters of the head."""
    return sum(p.numel() for p in model.get_submodule("1").parameters())


@torch.no_grad()
def pooled(weights: Path, data: Path | None) -> list[Row]:
    """Return how far tensor regressions are from the pooling and the head that they take the place of."""
    task = load_task("cifar10:resnet20", data=data)
    model: Any = task.dense(weights)
    (images, _), *_ = task.test_batches(500, batch_size=500)
    maps = nn.Sequential(model.conv1, model.bn1, model.relu, model.layer1, model.layer2, model.layer3)(images)
    rows = []
    for kind in (TuckerRegression, CPRegression, TTRegression):
        far = {}
        for dtype in (torch.float64, torch.float32):
            x, dense = maps.to(dtype), copied(model.linear).to(dtype)
            wanted, layer = dense(x.mean((2, 3))), kind.from_pooled(dense, tuple(x.shape[2:]))
            largest, scale = float((layer(x) - wanted).abs().max()), float(wanted.abs().max())
            far[str(dtype).removeprefix("torch.")] = {
                "largest": largest,
                "relative": largest / scale,
            }
        rows.append({"kind": kind.__name__, "params": sum(p.numel() for p in layer.parameters()), **far})
    return rows


def table(result: Row) -> str:
    """Return the Markdown page."""
    config, runs = result["config"], result["runs"]
    if not runs:
        return "Nothing was run yet.\n"
    lines = [HEAD.format(**config, torch=result["environment"]["torch"], full=runs[0]["head_params"])]
    dense = [run["test"] for run in runs]
    lines.append(f"| dense | {runs[0]['head_params']:,} | | {spread(dense)} | | |")
    for row in runs[0]["replaced"]:
        own = [
            each
            for run in runs
            for each in run["replaced"]
            if each["choice"] == row["choice"] and each["share"] == row["share"]
        ]
        scores = [each["test"] for each in own]
        gaps = [100 * (score - whole) for score, whole in zip(scores, dense, strict=True)]
        params = statistics.mean(each["params"] for each in own)
        fewer = 1 - params / runs[0]["head_params"]
        cells = [row["choice"], f"{params:,.0f}", f"{fewer:.1%}", spread(scores), ", ".join(f"{g:+.2f}" for g in gaps)]
        lines.append(f"| {' | '.join([*cells, '; '.join(row['plan'])])} |")
    more = {(row["network"], row["seed"]): 100 * row["test"] for row in result["tuned"]}
    lines += ["", TUNED.format(**config["tuned"])] if more else []
    for run in runs:
        first, second = (more.get((name, run["seed"])) for name in ("dense", "head"))
        if second is not None:
            gap = "" if first is None else f"{second - first:+.2f}"
            known = "" if first is None else f"{first:.2f}"
            lines.append(f"| {run['seed']} | {100 * run['test']:.2f} | {known} | {second:.2f} | {gap} |")
    if "pooled" in result:
        lines += ["", POOLED]
        for row in result["pooled"]:
            cells = [f"{row[dtype][name]:.1e}" for dtype in ("float64", "float32") for name in ("largest", "relative")]
            lines.append(f"| `{row['kind']}` | {row['params']:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    """Return the mean in percent, and the standard deviation where there are several."""
    mean = f"{100 * statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.2f}"


HEAD = """\
# The head of a small VGG as a tensor regression

`python -m benchmarks.tensor_regression.run`, torch {torch}, one thread. Four 3×3 convolutions with batch norm, a map of
64 × 8 × 8, then 4,096 → 128 → 10: the head has {full:,} parameters. Trained for {dense[epochs]} epochs on 45,000
pictures of CIFAR-10; test top-1 on all 10,000, in percent, mean over the seeds. Parameters are those of the whole head
with its biases; gaps are points against the dense network, seed by seed. Fitted to {calibration:,} training pictures,
nothing trained.

| head | parameters | fewer | top-1 | gaps | plan of the first seed |
|---|---:|---:|---:|---|---|"""
TUNED = """\
## After {epochs} epochs

`{choice}` at {share:.0%} of the head, and the dense network, both trained for {epochs} more epochs at {lr}.

| seed | dense before | dense, trained on | tensor regression, trained | gap |
|---:|---:|---:|---:|---:|"""
POOLED = """\
## A head behind a global pooling

ResNet-20: pooling and linear layer replaced by `from_pooled`. The largest difference of any class score of 500 test
pictures, and that as a share of the largest score, in double and in single precision.

| layer | parameters | float64 | relative | float32 | relative |
|---|---:|---:|---:|---:|---:|"""


if __name__ == "__main__":
    main()
