"""Tell twenty characters apart after one example of each: a learnet against plain siamese networks.

    python -m benchmarks.omniglot.run --data FOLDER [--runs FOLDER] [--only VARIANT] [--seed N] [--report]

Data: Omniglot's archives, see tenfold/tasks/omniglot.py. Every epoch is kept in the
folder of the runs, so that a run that was killed goes on; what is finished is not trained again. Weights after the last
epoch are tested, once.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.trials import Row, Trials, curve_of, spread, tuned
from tenfold.tasks import Task
from tenfold.training import TuneConfig

HERE = Path(__file__).parent


def main() -> None:
    """Train what is not trained yet, and write JSON and Markdown."""
    trials = Trials.read("omniglot", __doc__, HERE)
    trials.train("omniglot", trained)
    trials.write(table)


def trained(task: Task, config: Row, folder: Path) -> Row:
    """Return curve and scores of one run."""
    settings = {**task.tune_settings, **config["training"]}
    tuning = TuneConfig(**settings, seed=task.seed)
    model, result = tuned(task, tuning, folder, f"{task.id} {config}", scored=False)
    middle = model.get_submodule("middle")
    return {
        "variant": task.variant,
        "seed": task.seed,
        "params": sum(p.numel() for p in model.parameters()),
        "predicted": int(getattr(middle, "predicted", 0)),
        "validation": task.evaluate(model, split="validation"),
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
            cells = [WHAT[variant], f"{own[0]['predicted']:,}", f"{own[0]['params']:,}"]
            cells += [spread([100 - 100 * run[key] for run in own], 1, " %") for key in ("test", "validation")]
            cells += [", ".join(str(run["seed"]) for run in own)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


WHAT = {
    "learnet": "depthwise filters (learnet)",
    "shared": "none (plain siamese)",
    "whole": "the whole layer (unfactorized)",
}
HEAD = """\
# Twenty characters, each seen once

`python -m benchmarks.omniglot.run`, on {device}, torch {torch}, one thread. Siamese networks of three convolutions
with 16, 16 and 32 channels, trained on pairs of Omniglot's two small background sets (six of eight alphabets; the
other two are the validation part, 20 episodes), tested on the 20 official one-shot runs, 400 decisions among twenty.
{epochs} epochs of 3,200 exemplars with four pictures each, batches of {batch_size}, AdamW at {lr}, cosine; the same
for all, weights after the last epoch. The source (Bertinetto et al. 2016) has all background alphabets, larger
networks and longer training: 28.6 % for the learnet, 33 to 42 % for siamese networks.

| predicted from the example | numbers predicted | parameters | error, official runs | error, episodes | seeds |
|---|---:|---:|---:|---:|---|"""


if __name__ == "__main__":
    main()
