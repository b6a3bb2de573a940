"""Train MNIST's two fully connected trains with automatic ranks, and write parameters and test accuracies.

    python -m benchmarks.bayesian_mnist.run [--data FOLDER] [--runs FOLDER] [--seed N] [--pilot] [--report]

Data: MNIST's Parquet files, see tenfold/tasks/mnist.py. Every epoch is kept in the folder of the runs, so that a run
that was killed goes on; what is finished is not trained again. A tenth of the training images is held out throughout,
and is what settings are chosen on; the test images are looked at once, with the final weights. A pilot does not look at
them.
"""

from __future__ import annotations

import json
import statistics
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.trials import Row, Trials, finished
from tenfold.tasks import Task, load_task
from tenfold.training import TrainingFolder, TuneConfig
from tenfold.training.low_rank.priors import BayesianConfig
from tenfold.training.low_rank.svgd import log_likelihood
from tenfold.training.low_rank.train_bayesian import train_bayesian

HERE = Path(__file__).parent


def main() -> None:
    """Train what is not trained yet and write JSON and Markdown."""
    trials = Trials.read("bayesian_mnist", __doc__, HERE, pilot="held-out images only; writes no results")
    pilot = trials.options.pilot
    for variant, seed in trials.wanted():
        task = load_task("mnist:tt", data=trials.options.data, seed=seed)
        folder = trials.folder(variant, seed)
        train = partial(trained, task, trials.config, folder, test=not pilot)
        print(json.dumps(train() if pilot else finished(folder, train)), flush=True)
    if not pilot:
        trials.write(table)


def trained(task: Task, config: Row, folder: Path, *, test: bool) -> Row:
    """Return ranks, parameters and scores of one run."""
    common: Row = {"optimizer": "adamw", "weight_decay": 0.0, "autocast": "off", "seed": task.seed}
    training, tuning = (TuneConfig(**common | config[name]) for name in ("training", "tuning"))
    batches = partial(task.train_batches, batch_size=training.batch_size, seed=task.seed, hold_out=True)
    steps, samples = training.epochs * len(batches(0)), batches(0).samples
    prior = BayesianConfig(
        samples=samples,
        warmup=round(config["prior_free"] * steps),
        ramp=round(config["prior_grows"] * steps),
        **config["prior"],
    )
    model = task.build()
    before = _params(model)
    evaluate = partial(task.evaluate, split="validation")
    run = TrainingFolder(folder, f"{task.id} {config['training']} {config['prior']}")
    result = train_bayesian(model, batches, training, prior, tune=tuning, evaluate=evaluate, folder=run)
    tuned = result.tuning.history if result.tuning is not None else ()
    row: Row = {
        "seed": task.seed,
        "params_before": before,
        "params": _params(model),
        "ranks_before": result.before,
        "ranks": result.ranks,
        "pruned_in_epoch": [list(ranks.values()) for ranks in result.history],
        "curve": [e.model_dump(include={"epoch", "loss", "score", "seconds"}) for e in result.training.history],
        "tuning": [e.model_dump(include={"epoch", "loss", "score", "seconds"}) for e in tuned],
        "validation": evaluate(model),
    }
    if test:
        row["test"] = task.evaluate(model)
        with torch.no_grad():
            row["test_log_likelihood"] = log_likelihood(model.eval(), task.test_batches(batch_size=500))
    return row


def _params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def table(result: Row) -> str:
    """Return the Markdown page."""
    config, runs = result["config"], result["runs"]
    source = config["source"]
    device = result["environment"]["device_name"] or "the CPU"
    said = {name: _said(config[key]) for name, key in (("under", "training"), ("after", "tuning"), ("prior", "prior"))}
    lines = [HEAD.format(device=device, **said)]
    for run in runs:
        ranks = " and ".join("·".join(map(str, bonds)) for bonds in run["ranks"].values())
        cells = [str(run["seed"]), ranks, f"{run['params']:,}", f"{source['dense'] / run['params']:.0f}×"]
        cells += [f"{100 * run[key]:.2f} %" for key in ("validation", "test")]
        lines.append(f"| {' | '.join(cells)} | {run['test_log_likelihood']:.3f} |")
    if len(runs) > 1:
        mean = statistics.mean(run["test"] for run in runs)
        lines.append(f"| mean | | {statistics.mean(run['params'] for run in runs):,.0f} | | | {100 * mean:.2f} % | |")
    lines.append(
        f"| source | | {source['params']:,} | {source['dense'] / source['params']:.0f}× | "
        f"| {100 * source['accuracy']:.1f} % | -0.106 (50 particles) |"
    )
    lines += [
        "",
        "## Ranks by epoch under the prior",
        "",
        "| seed | ranks, and accuracy on the held-out images |",
        "|---:|---|",
    ]
    for run in runs:
        steps = []
        for ranks, epoch in zip(run["pruned_in_epoch"], run["curve"][-len(run["pruned_in_epoch"]) :], strict=False):
            bonds = " and ".join("·".join(map(str, b)) for b in ranks)
            steps.append(f"{bonds} ({epoch['score']:.3f})")
        lines.append(f"| {run['seed']} | {' → '.join(steps)} |")
    return "\n".join(lines) + "\n"


def _said(settings: Row) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


HEAD = """\
# MNIST: two layers whose ranks are found in training

`python -m benchmarks.bayesian_mnist.run`, on {device}, one thread. The network of Hawkins and Zhang 2019
(arXiv 1905.10478): 784 → 625 → 10 with a ReLU, 496,885 parameters dense; both weights tensor trains, of modes 7·4·7·4
by 5·5·5·5 and 25·25 by 5·2, 27,235 parameters at the ranks 20 that all bonds begin with. Parameters include the 635 of
the biases. A tenth of the training images is held out throughout and served for all choices; the test images were
looked at once, at the end.

1. Under the prior: {under}; {prior}.
2. Cores sliced, and trained on without the prior: {after}.

| seed | ranks found | parameters | times fewer than dense | held out | test accuracy | test log-likelihood |
|---|---|---:|---:|---:|---:|---:|"""


if __name__ == "__main__":
    main()
