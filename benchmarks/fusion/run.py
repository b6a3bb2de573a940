"""Tell the last figure of the product of two digits: polynomial fusion against concatenation, at equal parameters.

    python -m benchmarks.fusion.run [--data FOLDER] [--runs FOLDER] [--only VARIANT] [--seed N] [--report]

Data: MNIST's Parquet files, see tenfold/tasks/digit_products.py. Every epoch is kept in the
folder of the runs, so that a run that was killed goes on; what is finished is not trained again. Weights after the last
epoch are tested, once.
"""

from __future__ import annotations

import json
import statistics
from functools import partial
from pathlib import Path

from benchmarks.trials import Row, Trials, finished
from tenfold.tasks import Task, load_task
from tenfold.training import TrainingFolder, TuneConfig, finetune

HERE = Path(__file__).parent


def main() -> None:
    """Train what is not trained yet, and write JSON and Markdown."""
    trials = Trials.read("fusion", __doc__, HERE)
    for variant, seed in trials.wanted():
        task = load_task(f"digit_products:{variant}", data=trials.options.data, seed=seed)
        folder = trials.folder(variant, seed)
        print(json.dumps(finished(folder, partial(trained, task, trials.config, folder))), flush=True)
    trials.write(table)


def trained(task: Task, config: Row, folder: Path) -> Row:
    """Return curve and scores of one run."""
    tuning = TuneConfig(**config["training"], optimizer="adamw", autocast="off", seed=task.seed)
    model = task.build()
    result = finetune(
        model,
        partial(task.train_batches, batch_size=tuning.batch_size, seed=task.seed, hold_out=True),
        tuning,
        evaluate=partial(task.evaluate, split="validation"),
        folder=TrainingFolder(folder / "epochs", f"{task.id} {config}"),
    )
    return {
        "variant": task.variant,
        "seed": task.seed,
        "fusion_params": sum(p.numel() for p in model.get_submodule("fusion").parameters()),
        "params": sum(p.numel() for p in model.parameters()),
        "validation": result.score,
        "test": task.evaluate(model),
        "curve": [epoch.model_dump(include={"epoch", "loss", "score", "seconds"}) for epoch in result.history],
    }


def table(result: Row) -> str:
    """Return the Markdown page."""
    config, runs, env = result["config"], result["runs"], result["environment"]
    lines = [HEAD.format(**config["training"], torch=env["torch"], device=env["device_name"] or "the CPU")]
    for variant in config["variants"]:
        own = [run for run in runs if run["variant"] == variant]
        if own:
            cells = [WHAT[variant], f"{own[0]['fusion_params']:,}", f"{own[0]['params']:,}"]
            cells += [_spread([run[key] for run in own]) for key in ("test", "validation")]
            cells += [f"{statistics.mean(run['curve'][0]['score'] for run in own):.4f}"]
            cells += [", ".join(str(run["seed"]) for run in own)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"


WHAT = {
    "fusion": "order two",
    "fusion3": "order three, repeats",
    "concat": "concatenation, hidden layer",
    "add": "concatenation, linear (order one)",
}
HEAD = """\
# Two digits and the last figure of their product

`python -m benchmarks.fusion.run`, on {device}, torch {torch}, one thread. 54,000 pairs of MNIST's training images,
6,000 for validation, 10,000 of its test images. The same encoder for both digits (784 → 128 → 32, tanh), then one of
four ways to join them, all of rank or width 48; {epochs} epochs, batches of {batch_size}, AdamW at {lr}, cosine; the
same for all, weights after the last epoch. The source (Kefalas et al. 2020) measures videos of faces and has no such
figures.

| joined by | its parameters | all parameters | test accuracy | validation | after one epoch | seeds |
|---|---:|---:|---:|---:|---:|---|"""


if __name__ == "__main__":
    main()
