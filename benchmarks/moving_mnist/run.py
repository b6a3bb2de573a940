"""Tell which digit moves through a film: a GRU with a dense input matrix against one with a tensor train.

    python -m benchmarks.moving_mnist.run [--data FOLDER] [--runs FOLDER] [--only VARIANT] [--seed N] [--report]

Data: MNIST's Parquet files, see tenfold/tasks/moving_mnist.py. Every epoch is kept in the folder of the runs, so that a
run that was killed goes on; what is finished is not trained again. Weights after the last epoch are tested, once.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.trials import Row, Trials, spread, tuned
from tenfold.tasks import Task, load_task
from tenfold.training import TuneConfig

HERE = Path(__file__).parent


def main() -> None:
    """Train what is not trained yet, time steps of training in turns, and write JSON and Markdown."""
    trials = Trials.read("moving_mnist", __doc__, HERE)
    trials.train("moving_mnist", trained)
    trials.write(table, times=timed(trials.config, trials.options.data))


def trained(task: Task, config: Row, folder: Path) -> Row:
    """Return curve and scores of one run."""
    chosen = {name: config[name] for name in ("epochs", "batch_size", "lr", "weight_decay", "warmup")}
    tuning = TuneConfig(**chosen, optimizer="adamw", autocast="off", seed=task.seed)
    model, result = tuned(task, tuning, folder, f"{task.id} {config}")
    return {
        "variant": task.variant,
        "seed": task.seed,
        "input_params": input_params(model),
        "params": sum(p.numel() for p in model.parameters()),
        "validation": result.score,
        "test": task.evaluate(model),
        "curve": [epoch.model_dump(include={"epoch", "loss", "lr", "score", "seconds"}) for epoch in result.history],
    }


def input_params(model: nn.Module) -> int:
    """Return the number of weights between the inputs and the gates."""
    rnn: Any = model.get_submodule("rnn")
    return (
        rnn.get_parameter("weight_ih_l0").numel()
        if isinstance(rnn, nn.GRU)
        else sum(c.numel() for c in rnn.cells[0].ih.cores)
    )


def timed(config: Row, data: Path | None) -> list[Row]:
    """Return milliseconds of the processor for a forward, and for a step of training, of all variants in turns."""
    rows = []
    for size in config["timing"]["batches"]:
        models = {v: load_task(f"moving_mnist:{v}", data=data).build() for v in config["variants"]}
        films = torch.rand(size, *load_task("moving_mnist").example_inputs(1).shape[1:])
        passes: dict[str, Callable[[nn.Module, torch.Tensor], None]] = {"forward": _forward, "and backward": _backward}
        for name, once in passes.items():
            ms: dict[str, list[float]] = {variant: [] for variant in models}
            for model in models.values():
                once(model, films)
            for _ in range(config["timing"]["rounds"]):
                for variant, model in models.items():
                    start = time.process_time()
                    once(model, films)
                    ms[variant].append((time.process_time() - start) * 1e3)
            rows.append({"batch": size, "pass": name, "ms": ms})
    return rows


@torch.no_grad()
def _forward(model: nn.Module, films: torch.Tensor) -> None:
    model(films)


def _backward(model: nn.Module, films: torch.Tensor) -> None:
    model.zero_grad()
    model(films).sum().backward()


def table(result: Row) -> str:
    """Return the Markdown page."""
    config, runs, env = result["config"], result["runs"], result["environment"]
    lines = [HEAD.format(**config, torch=env["torch"], device=env["device_name"] or "the CPU")]
    dense = next((r["input_params"] for r in runs if r["variant"] == "gru"), 0)
    for variant in config["variants"]:
        own = [run for run in runs if run["variant"] == variant]
        if own:
            count = own[0]["input_params"]
            cells = [variant, f"{count:,}", f"{dense / count:,.0f}×", f"{own[0]['params']:,}"]
            cells += [spread([run[key] for run in own], 3) for key in ("test", "validation")]
            cells += [", ".join(str(run["seed"]) for run in own)]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Learning curves", "", "Mean loss in training / accuracy on the validation part, by epoch.", ""]
    epochs = range(1, config["epochs"] + 1)
    lines += [f"| network | seed | {' | '.join(map(str, epochs))} |", f"|---|---:|{'---:|' * len(epochs)}"]
    for run in runs:
        cells = [f"{e['loss']:.2f} / {e['score']:.3f}" for e in run["curve"]]
        lines.append(f"| {run['variant']} | {run['seed']} | {' | '.join(cells)} |")
    lines += ["", TIMES]
    for row in result["times"]:
        medians = [statistics.median(row["ms"][variant]) for variant in config["variants"]]
        ratios = [a / b for a, b in zip(*(row["ms"][variant] for variant in config["variants"]), strict=True)]
        cells = [str(row["batch"]), row["pass"], *(f"{ms:.1f}" for ms in medians), f"{statistics.median(ratios):.2f}×"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


HEAD = """\
# Moving digits: a GRU over frames of 4,096 pixels

`python -m benchmarks.moving_mnist.run`, on {device}, torch {torch}, one thread. Ten frames of 64×64, flat; a digit of
MNIST moves through them and bounces off the borders. 3,600 digits for training, each in a new film in every epoch, 400
for validation, 1,000 others for the test. GRU with 256 hidden units, {epochs} epochs, batches of {batch_size}, AdamW at
{lr}, cosine; the same for both, nothing was tuned, and the weights are those after the last epoch.

| network | input weights | times fewer | all parameters | test accuracy | validation | seeds |
|---|---:|---:|---:|---:|---:|---|"""
TIMES = """\
## Time

Milliseconds of the processor, medians of rounds in turns; *times faster* is the median of the ratios of the rounds.

| batch | pass | GRU | TT-GRU | TT-GRU times faster |
|---:|---|---:|---:|---:|"""


if __name__ == "__main__":
    main()
