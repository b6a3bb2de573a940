"""Forecast the Lorenz attractor and Genz's functions: a higher-order LSTM against an LSTM of as many parameters.

    python -m benchmarks.forecast.run [--runs FOLDER] [--only VARIANT] [--seed N] [--report]

The series are generated with a seed, see tenfold/tasks/forecast.py. Every epoch is kept in the
folder of the runs, so that a run that was killed goes on; what is finished is not trained again. Weights after the last
epoch are tested, once.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.trials import Row, Trials, curve_of, spread, tuned
from tenfold.training import TuneConfig

HERE = Path(__file__).parent


def main() -> None:
    """Train what is not trained yet, and write JSON and Markdown."""
    trials = Trials.read("forecast", __doc__, HERE)
    trials.train("forecast", trained)
    trials.write(table)


def trained(task: Any, config: Row, folder: Path) -> Row:
    """Return curve and errors of one run."""
    tuning = TuneConfig(**config["training"], optimizer="adamw", autocast="off", seed=task.seed)
    model, result = tuned(task, tuning, folder, f"{task.id} {config}")
    by_step = task.errors(model)
    return {
        "variant": task.variant,
        "seed": task.seed,
        "params": sum(p.numel() for p in model.parameters()),
        "validation": result.score,
        "test": task.evaluate(model),
        "upto": {str(h): float(by_step[:h].square().mean().sqrt()) for h in config["horizons"][task.system]},
        "by_step": by_step.tolist(),
        "curve": curve_of(result),
    }


def table(result: Row) -> str:
    """Return the Markdown page."""
    config, runs, env = result["config"], result["runs"], result["environment"]
    lines = [HEAD.format(**config["training"], torch=env["torch"], device=env["device_name"] or "the CPU")]
    for system, title in (("lorenz", "Lorenz attractor"), ("genz", "Genz's functions")):
        horizons = [str(h) for h in config["horizons"][system]]
        own = {k: [r for r in runs if r["variant"] == f"{system}-{k}"] for k in ("hot-lstm", "lstm")}
        if not all(own.values()):
            continue
        lines += [
            "",
            f"## {title}",
            "",
            f"| network | parameters | {' | '.join(f'up to step {h}' for h in horizons)} | seeds |",
        ]
        lines.append(f"|---|---:|{'---:|' * len(horizons)}---|")
        for kind, rows in own.items():
            cells = [kind, f"{rows[0]['params']:,}", *(spread([r["upto"][h] for r in rows]) for h in horizons)]
            lines.append(f"| {' | '.join([*cells, ', '.join(str(r['seed']) for r in rows)])} |")
        gains = [
            1
            - statistics.mean(r["upto"][h] for r in own["hot-lstm"])
            / statistics.mean(r["upto"][h] for r in own["lstm"])
            for h in horizons
        ]
        lines.append(f"| lower by | | {' | '.join(f'{100 * gain:.1f} %' for gain in gains)} | |")
    return "\n".join(lines) + "\n"


HEAD = """\
# Forecasts of many steps: recurrence of higher order

`python -m benchmarks.forecast.run`, on {device}, torch {torch}, one thread. Twenty steps are given; root of the mean
squared error over all steps up to the horizon, of series of about unit size. 3,600 series for training, 400 for
validation, 1,000 for the test, all generated. Encoder and decoder with one layer each; the higher-order LSTM has 16
units, lags, order and rank 2. {epochs} epochs, batches of {batch_size}, AdamW at {lr}, cosine, scheduled sampling;
the same for both, nothing was tuned, weights after the last epoch. The source (Yu et al. 2017) reports errors 5 to 12
% lower than those of LSTMs for long horizons, with larger networks and 5,000 steps of training."""


if __name__ == "__main__":
    main()
