"""Train Garipov's six convolutions on CIFAR-10 from scratch, dense and as tensor trains, and write accuracies.

    python -m benchmarks.garipov.run [--data FOLDER] [--runs FOLDER] [--only VARIANT] [--seed N] [--report]

Data: CIFAR-10's Parquet files, see tenfold/tasks/cifar10.py. Every epoch is kept in the folder of the runs, so that a
run that was killed goes on; what is finished is not trained again. Weights after the last epoch are tested, once. A run
of more epochs is another run (the learning rate falls over all of them): set ``epochs`` and give another folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.garipov.net import build
from tenfold.profiling import environment
from tenfold.tasks import Task, load_task
from tenfold.tuning import TuneConfig, finetune

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
RUNS = Path("runs") / "garipov"
Row = dict[str, Any]


def main() -> None:
    """Train what is not trained yet and write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "garipov.yaml")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--only", action="append", help="a variant, such as conv; may be repeated")
    parser.add_argument("--seed", type=int, action="append")
    parser.add_argument("--report", action="store_true", help="train nothing, write what there is")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = yaml.safe_load(options.config.read_text())
    for seed in () if options.report else options.seed or config["seeds"]:
        task = load_task("cifar10", data=options.data, seed=seed)
        for variant in options.only or config["variants"]:
            print(json.dumps(trained(task, variant, config, options.runs / f"{variant}-{seed}")), flush=True)
    rows = [
        json.loads(file.read_text())
        for variant in config["variants"]
        for seed in config["seeds"]
        if (file := options.runs / f"{variant}-{seed}" / "run.json").is_file()
    ]
    result = {"benchmark": "garipov", "config": config, "runs": rows}
    result["environment"] = environment(torch.device("cpu")).model_dump(mode="json")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "garipov.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "garipov.md").write_text(table(result))
    print(table(result))


def trained(task: Task, variant: str, config: Row, folder: Path) -> Row:
    """Return curve and scores of one run, from its folder where it is finished."""
    done = folder / "run.json"
    if done.is_file():
        found: Row = json.loads(done.read_text())
        return found
    chosen = {name: config[name] for name in ("epochs", "batch_size", "lr", "weight_decay", "warmup")}
    tuning = TuneConfig(**chosen, seed=task.seed)
    model = build(config["variants"][variant], task.seed)
    result = finetune(
        model,
        partial(task.train_batches, batch_size=tuning.batch_size, seed=task.seed, hold_out=True),
        tuning,
        evaluate=partial(task.evaluate, split="validation"),
        folder=folder / "epochs",
        identity=f"{variant} {config['variants'][variant]}",
        on_epoch=lambda epoch: print(variant, epoch, flush=True),
    )
    row = {
        "variant": variant,
        "seed": task.seed,
        "params": sum(p.numel() for p in model.parameters()),
        "epochs": tuning.epochs,
        "validation": result.score,
        "test": task.evaluate(model),
        "curve": [epoch.model_dump(include={"epoch", "loss", "lr", "score", "seconds"}) for epoch in result.history],
    }
    written = done.with_suffix(".partial")
    written.write_text(json.dumps(row) + "\n")
    written.replace(done)
    return row


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
