"""Tell the last figure of the product of two digits: polynomial fusion against concatenation, at equal parameters.

    python -m benchmarks.fusion.run [--data FOLDER] [--runs FOLDER] [--only VARIANT] [--seed N] [--report]

Data: MNIST's Parquet files, see tenfold/tasks/digit_products.py. Every epoch is kept in the
folder of the runs, so that a run that was killed goes on; what is finished is not trained again. Weights after the last
epoch are tested, once.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.trials import Row, Trials, curve_of, spread, tuned
from tenfold.tasks import Task
from tenfold.training import TuneConfig

HERE = Path(__file__).parent


def main() -> None:
    """Train what is not trained yet, and write JSON and Markdown."""
    trials = Trials.read("fusion", __doc__, HERE)
    trials.train("digit_products", trained)
    trials.write(table)


def trained(task: Task, config: Row, folder: Path) -> Row:
    """Return curve and scores of one run."""
    tuning = TuneConfig(**config["training"], optimizer="adamw", autocast="off", seed=task.seed)
    model, result = tuned(task, tuning, folder, f"{task.id} {config}")
    return {
        "variant": task.variant,
        "seed": task.seed,
        "fusion_params": sum(p.numel() for p in model.get_submodule("fusion").parameters()),
        "params": sum(p.numel() for p in model.parameters()),
        "validation": result.score,
        "test": task.evaluate(model),
        "curve": curve_of(result),
    }


def table(result: Row) -> str:
    """Return the Markdown page."""
    config, runs, env = result["config"], result["runs"], result["environment"]
    lines = [HEAD.format(**config["training"], torch=env["torch"], device=env["device_name"] or "the CPU")]
    for variant in config["variants"]:
        own = [run for run in runs if run["variant"] == variant]
        if own:
            cells = [WHAT[variant], f"{own[0]['fusion_params']:,}", f"{own[0]['params']:,}"]
            cells += [spread([run[key] for run in own]) for key in ("test", "validation")]
            cells += [f"{statistics.mean(run['curve'][0]['score'] for run in own):.4f}"]
            cells += [", ".join(str(run["seed"]) for run in own)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


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
