"""Train Garipov's six convolutions on CIFAR-10 from scratch, dense and as tensor trains, and write accuracies.

    python -m benchmarks.garipov.run [--data FOLDER] [--runs FOLDER] [--only VARIANT] [--seed N] [--report]

Data: CIFAR-10's Parquet files, see tenfold/tasks/cifar10.py. Every epoch is kept in the folder of the runs, so that a
run that was killed goes on; what is finished is not trained again. Weights after the last epoch are tested, once. A run
of more epochs is another run (the learning rate falls over all of them): set ``epochs`` and give another folder.
"""

from __future__ import annotations

import json
import statistics
from functools import partial
from pathlib import Path

from benchmarks.garipov.net import build
from benchmarks.trials import Row, Trials, finished
from tenfold.tasks import Task, load_task
from tenfold.training import TrainingFolder, TuneConfig, TuneProgress, finetune

HERE = Path(__file__).parent


def main() -> None:
    """Train what is not trained yet and write JSON and Markdown."""
    trials = Trials.read("garipov", __doc__, HERE)
    for variant, seed in trials.wanted():
        task, folder = load_task("cifar10", data=trials.options.data, seed=seed), trials.folder(variant, seed)
        row = finished(folder, partial(trained, task, variant, trials.config, folder))
        print(json.dumps(row), flush=True)
    trials.write(table)


def trained(task: Task, variant: str, config: Row, folder: Path) -> Row:
    """Return curve and scores of one run."""
    chosen = {name: config[name] for name in ("epochs", "batch_size", "lr", "weight_decay", "warmup")}
    tuning = TuneConfig(**chosen, seed=task.seed)
    model = build(config["variants"][variant], task.seed)
    result = finetune(
        model,
        partial(task.train_batches, batch_size=tuning.batch_size, seed=task.seed, hold_out=True),
        tuning,
        evaluate=partial(task.evaluate, split="validation"),
        folder=TrainingFolder(folder / "epochs", f"{variant} {config['variants'][variant]}"),
        progress=TuneProgress(lambda epoch: print(variant, epoch, flush=True)),
    )
    return {
        "variant": variant,
        "seed": task.seed,
        "params": sum(p.numel() for p in model.parameters()),
        "epochs": tuning.epochs,
        "validation": result.score,
        "test": task.evaluate(model),
        "curve": [epoch.model_dump(include={"epoch", "loss", "lr", "score", "seconds"}) for epoch in result.history],
    }


def table(result: Row) -> str:
    """Return the Markdown page."""
    config, runs = result["config"], result["runs"]
    lines = [HEAD.format(**config, device=result["environment"]["device_name"] or "the CPU")]
    for variant, about in config["variants"].items():
        own = [run for run in runs if run["variant"] == variant]
        source = f"{100 * config['sources'][variant]:.1f} %"
        if not own:
            lines.append(f"| {variant} | | | not run yet | | {source} |")
            continue
        against = "conv-fc" if "hidden" in about else "conv"
        dense = next((run["params"] for run in runs if run["variant"] == against), None)
        params = own[0]["params"]
        cells = [variant, f"{params:,}", f"{dense / params:.2f}×" if dense else ""]
        cells += [_spread([run[key] for run in own]) for key in ("test", "validation")]
        lines.append(f"| {' | '.join(cells)} | {source} |")
    most = max((len(run["curve"]) for run in runs), default=0)
    lines += ["", "## Learning curves", "", "Mean loss in training / accuracy on the validation part, by epoch.", ""]
    lines += [f"| network | seed | {' | '.join(map(str, range(1, most + 1)))} | s per epoch |"]
    lines += [f"|---|---:|{'---:|' * most}---:|"]
    for run in runs:
        cells = [f"{e['loss']:.2f} / {e['score']:.3f}" for e in run["curve"]]
        seconds = statistics.median(e["seconds"] for e in run["curve"])
        lines.append(f"| {run['variant']} | {run['seed']} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    mean = f"{100 * statistics.mean(values):.2f}"
    return f"{mean} %" if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.2f} %"


HEAD = """\
# CIFAR-10 from scratch: six convolutions, dense and as tensor trains

`python -m benchmarks.garipov.run`, on {device}, one thread. The network of Garipov et al. 2016 (arXiv 1611.03214):
3→64→64, pool, →128→128, pool, →128→128 without borders, a norm and a ReLU after each, mean and a linear layer; *fc*
has hidden layers of 1,536 and 512 in the place of the mean. *tt* and *naive*: all kernels but the first are trains,
with paired modes of the channels or of the kernel as it is, at the times fewer parameters of the whole network that the
source has. {epochs} epochs where the source trains {source_epochs}, batches of {batch_size}, SGD at {lr} with Nesterov
momentum, the rate rising over a quarter of the steps and falling as a cosine; crops and mirror images. The same for all
networks; nothing was tuned. A tenth of the training pictures is held out; weights are those after the last epoch.

| network | parameters | times fewer | test accuracy | validation | source |
|---|---:|---:|---:|---:|---:|"""


if __name__ == "__main__":
    main()
