"""Train SST-5 classifiers with dense tables of words and with tensor trains, and write curves and test accuracies.

    python -m benchmarks.sst.run [--data FOLDER] [--runs FOLDER] [--only VARIANT] [--seed N] [--report]

Data: the stsa.fine.* files, see tenfold/tasks/sst.py. Every epoch is kept in the folder of the runs, so that a run that
was killed goes on; what is finished is not trained again. Several processes may train different runs. The epoch is
chosen on the set's validation part; the test part is looked at once, with the weights of that epoch.
"""

from __future__ import annotations

import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from benchmarks.trials import Row, Trials, finished
from tenfold.records import write_text
from tenfold.tasks import Task, load_task, load_weights
from tenfold.training import TrainingFolder, TuneConfig, finetune

HERE = Path(__file__).parent


def main() -> None:
    """Train what is not trained yet and write JSON and Markdown."""
    trials = Trials.read("sst", __doc__, HERE)
    for variant, seed in trials.wanted():
        task = load_task(f"sst:fine-{variant}", data=trials.options.data, seed=seed)
        folder = trials.folder(variant, seed)
        print(json.dumps(finished(folder, partial(trained, task, trials.config, folder))), flush=True)
    trials.write(table)


def tuning_of(config: Row, seed: int) -> TuneConfig:
    """Return how all variants are trained."""
    chosen = {name: config[name] for name in ("epochs", "batch_size", "lr", "weight_decay", "warmup")}
    return TuneConfig(**chosen, optimizer="adamw", autocast="off", seed=seed)


def trained(task: Task, config: Row, folder: Path) -> Row:
    """Return curves and scores of one run."""
    tuning = tuning_of(config, task.seed)
    model = task.build()
    batches = partial(task.train_batches, batch_size=tuning.batch_size, seed=tuning.seed, hold_out=True)
    best = _Best(task, folder)
    epochs = TrainingFolder(folder / "epochs", f"{task.id} {config}")
    result = finetune(model, batches, tuning, evaluate=best, folder=epochs)
    chosen = load_weights(task.build(), best.weights)
    table: Any = chosen.get_submodule("embedding")
    return {
        "variant": str(task.variant).partition("-")[2],
        "seed": task.seed,
        "table_params": sum(p.numel() for p in table.parameters()),
        "params": sum(p.numel() for p in chosen.parameters()),
        "epoch": max(result.history, key=lambda epoch: epoch.score or 0.0).epoch,  # the first of equal ones
        "validation": best.score,
        "test": task.evaluate(chosen),
        "curve": [epoch.model_dump(include={"epoch", "loss", "lr", "score", "seconds"}) for epoch in result.history],
    }


class _Best:
    """Scores a model on the validation part after each epoch, and keeps the weights of the best."""

    def __init__(self, task: Task, folder: Path) -> None:
        self.task, self.state, self.weights = task, folder / "best.json", folder / "best.safetensors"
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def score(self) -> float:
        """The best score so far."""
        return float(json.loads(self.state.read_text())) if self.state.is_file() else -1.0

    def __call__(self, model: nn.Module) -> float:
        score = self.task.evaluate(model, split="validation")
        if score > self.score:
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, self.weights)
            write_text(self.state, json.dumps(score))
        return score


def table(result: Row) -> str:
    """Return the Markdown page."""
    config, runs = result["config"], result["runs"]
    lines = [HEAD.format(**config, device=result["environment"]["device_name"] or "the CPU")]
    for variant in config["variants"]:
        own = [run for run in runs if run["variant"] == variant]
        if not own:
            lines.append(f"| {variant} | | | not run | | | {config['sources'][variant]:.3f} |")
            continue
        params = own[0]["table_params"]
        dense = next((r["table_params"] for r in runs if r["variant"] == "full"), params)
        test, held = ([run[key] for run in own] for key in ("test", "validation"))
        cells = [
            variant,
            f"{params:,}",
            f"{dense / params:.0f}×",
            _spread(test),
            ", ".join(str(r["seed"]) for r in own),
        ]
        cells += [_spread(held), f"{config['sources'][variant]:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Learning curves", "", "Mean loss in training / accuracy on the validation part, by epoch.", ""]
    epochs = range(1, config["epochs"] + 1)
    lines += [f"| table | seed | {' | '.join(map(str, epochs))} | chosen | s per epoch |"]
    lines += [f"|---|---:|{'---:|' * len(epochs)}---:|---:|"]
    for run in runs:
        cells = [f"{e['loss']:.2f} / {e['score']:.3f}" for e in run["curve"]]
        seconds = statistics.median(e["seconds"] for e in run["curve"])
        lines.append(f"| {run['variant']} | {run['seed']} | {' | '.join(cells)} | {run['epoch']} | {seconds:.0f} |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


HEAD = """\
# SST-5: tables of words as tensor trains

`python -m benchmarks.sst.run`, on {device}, one thread. A bidirectional LSTM (one layer, 128 in each direction)
over rows of 256, the mean of its outputs, dropout 0.5; trained from scratch on the 8,544 whole sentences for {epochs}
epochs, batches of {batch_size}, AdamW at {lr}, cosine. The epoch is chosen on the validation part (1,101 sentences);
accuracy is on the whole test part (2,210). The same settings for all tables; none was tuned. The sources use two
layers, and a vocabulary of 17,200 words where this one has 16,581.

| table | its parameters | times fewer | test accuracy | seeds | validation | source |
|---|---:|---:|---:|---|---:|---:|"""


if __name__ == "__main__":
    main()
