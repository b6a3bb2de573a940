"""Compress the LSTM of a trained network, or its table of words, and test it without tuning and after one epoch.

    python -m benchmarks.sst.compress --weights FILE [--data FOLDER] [--runs FOLDER]

FILE is the best.safetensors that benchmarks.sst.run leaves in RUNS/full-0. What is finished is kept in the folder of
the runs, and not done again. Nothing is chosen: one epoch is one epoch, on the training part without the validation
part.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

import tenfold
from tenfold.planning.unroll import refuse_unused
from tenfold.profiling import environment
from tenfold.surgery import unroll_rnns
from tenfold.tasks import Task, load_task
from tenfold.training import TuneConfig, finetune

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
Row = dict[str, Any]


def main() -> None:
    """Compress in every way and write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "compress.yaml")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs") / "sst_compress")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = yaml.safe_load(options.config.read_text())
    task = load_task("sst:fine-full", data=options.data, seed=config["seed"])
    model = task.dense(options.weights)
    options.runs.mkdir(parents=True, exist_ok=True)
    rows = [kept(options.runs / "dense.json", partial(untouched, task, model, options.runs))]
    for number, (name, way) in enumerate(config["rows"].items()):
        done = options.runs / f"{number}.json"
        rows.append(kept(done, partial(compressed, task, model, name, way, config, options.runs / str(number))))
        print(json.dumps(rows[-1]), flush=True)
    rows = [row | {"ms": ms} for row, ms in zip(rows, timed(task, model, config, rows), strict=True)]
    result = {"benchmark": "sst_compress", "config": config, "rows": rows}
    result["environment"] = environment(torch.device("cpu")).model_dump(mode="json")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "sst_compress.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "sst_compress.md").write_text(table(result))
    print(table(result))


def kept(path: Path, make: Any) -> Row:
    """Return the row in a file; made and written where there is none."""
    if not path.is_file():
        written = path.with_suffix(".partial")
        written.write_text(json.dumps(make()) + "\n")
        written.replace(path)
    found: Row = json.loads(path.read_text())
    return found


def untouched(task: Task, model: nn.Module, runs: Path) -> Row:
    """Return what one more epoch does to the network that is not compressed."""
    before = task.evaluate(model)
    tuned = _copy(model, task)
    _tune(tuned, task, runs / "dense")
    return {"name": "not compressed", "params": size(model), "test": before, "tuned": task.evaluate(tuned)}


def compressed(task: Task, model: nn.Module, name: str, way: Row, config: Row, folder: Path) -> Row:
    """Return what is left of the accuracy when one part has a third of its parameters."""
    parts = {path: size(model.get_submodule(path)) for path in ("embedding", "rnn", "head")}
    part = way["part"]
    recipe = {
        "budget": {"max_params": size(model) - parts[part] * (1 - 1 / config["share"])},
        "keep": [path for path in parts if path != part],
        "keep_ends": False,
        "seed": config["seed"],
        **way["recipe"],
    }
    data = list(task.calibration_batches(config["calibration"], batch_size=100, seed=config["seed"]))
    runtime = tenfold.Runtime(measure=False)
    small = tenfold.compress(model, task.example_inputs(), recipe, data=data, runtime=runtime)
    row = {"name": name, "params": size(small.model), "part": parts[part]}
    row |= {"left": size(small.model.get_submodule(part)), "test": task.evaluate(small.model)}
    row["ranks"] = {layer.path: layer.rank for layer in small.plan.factorized}
    row["macs"] = [small.record.before.macs, small.record.after.macs]
    _tune(small.model, task, folder)
    return row | {"tuned": task.evaluate(small.model)}


@torch.no_grad()
def timed(task: Task, model: nn.Module, config: Row, rows: list[Row]) -> list[list[float]]:
    """Return milliseconds of the processor for one sentence of 20 words, of all rows in turns."""
    opened, example = unroll_rnns(model), task.example_inputs(1)
    cost = tenfold.profile(opened, example)
    models = [model]
    for row, way in zip(rows[1:], config["rows"].values(), strict=True):
        recipe = {"rule": {"name": "fixed", "ranks": row["ranks"]}, "formats": way["recipe"]["formats"]}
        plan = refuse_unused(tenfold.plan(opened, cost, recipe), model)
        models.append(tenfold.apply(model, plan).eval())
    ms: list[list[float]] = [[] for _ in models]
    for turn in range(config["rounds"] + 1):
        for own, each in zip(ms, models, strict=True):
            start = time.process_time()
            each(example)
            if turn:  # the first is to warm up
                own.append((time.process_time() - start) * 1e3)
    return ms


def size(module: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in module.parameters())


def _copy(model: nn.Module, task: Task) -> nn.Module:
    made = task.build()
    made.load_state_dict(model.state_dict())
    return made


def _tune(model: nn.Module, task: Task, folder: Path) -> None:
    config = TuneConfig(**task.tune_settings, autocast="off", seed=task.seed)
    batches = partial(task.train_batches, batch_size=config.batch_size, seed=config.seed, hold_out=True)
    finetune(model, batches, config, folder=folder)


def table(result: Row) -> str:
    """Return the Markdown page."""
    lines = [HEAD.format(**result["config"], torch=result["environment"]["torch"])]
    for row in result["rows"]:
        part = f"{row['part']:,} → {row['left']:,} ({row['part'] / row['left']:.2f}×)" if "part" in row else ""
        ratios = sorted(dense / own for dense, own in zip(result["rows"][0]["ms"], row["ms"], strict=True))
        low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
        speed = f"{statistics.median(ratios):.2f} ({low:.2f}–{high:.2f})" if "part" in row else ""
        cells = [row["name"], part, f"{row['params']:,}", f"{row['test']:.3f}", f"{row['tuned']:.3f}", speed]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


HEAD = """\
# A trained LSTM and its table of words, with a third of their parameters

`python -m benchmarks.sst.compress --weights FILE`, torch {torch}, one thread. The network of `benchmarks.sst.run` with
the dense table (SST-5, seed 0): accuracy on the whole test part (2,210 sentences), without tuning and after one epoch
(AdamW, 0.0005). By data: {calibration} unlabeled sentences of the training part. The other parts stay as they are.
Speed is that of one sentence of 20 words against the network that is not compressed, by the clock of the processor, in
turns; medians, and 10 to 90 % of the rounds.

| what, and how | parameters of that part | of all | accuracy | after one epoch | times as fast |
|---|---:|---:|---:|---:|---:|"""


if __name__ == "__main__":
    main()
