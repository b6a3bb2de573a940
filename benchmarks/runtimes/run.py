"""Dense against compressed in the runtime that runs them: speed, and accuracy at equal speed.

    python -m benchmarks.runtimes.run speed [--only TEXT] [--runtime NAME] [--batch N] [--threads N]
    python -m benchmarks.runtimes.run accuracy --weights FOLDER --images FOLDER [--only NAME]

``--weights`` holds ``resnet20.safetensors``, ``resnet56.safetensors`` and ``mobilenet_v2.safetensors``; ``--images``
photographs NNNN.jpg as ``benchmarks.certainty`` takes them. Writes ``runtimes.json`` and ``runtimes.md`` after every
row; rows that are there are not repeated. Wants a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from benchmarks.certainty.run import mobilenet, photographs
from benchmarks.trials import RESULTS
from benchmarks.zoo import build
from tenfold import Recipe, Runtime
from tenfold.errors import BudgetError
from tenfold.pipeline import carry_out
from tenfold.planning import LatencySearch, decide
from tenfold.planning.latency_budget import plan_within_latency, with_structure
from tenfold.planning.tabulate import tabulate
from tenfold.planning.target import Target
from tenfold.profiling import agreement, compare_latency, environment, profile
from tenfold.records import write_text
from tenfold.runtimes import runtime_named
from tenfold.tasks import load_task

HERE = Path(__file__).parent
HEAD = """\
# In the runtime that runs it

`python -m benchmarks.runtimes.run`; device, versions and settings are in `runtimes.json`. Dense and compressed are
timed in turns, in the same runtime; the interval is that of the median of the ratios, with a confidence of 95 %.

"""
SPEED = """\
## What a network gains of what it saves

Planned for half the time in the runtime, at the batch and on the threads of the row. *Gained*: times faster over times
fewer multiply-accumulates. *Slower*: layers whose factorized form measured slower than they, and which stayed dense.

| network | runtime | batch | threads | dense ms | times faster | times fewer MACs | gained | slower |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
"""
ACCURACY = """\
## Accuracy at a speed

Untrained, from unlabeled samples; ONNX Runtime, batch 8, one thread. *Asked*: how many times faster, by a latency
budget.

| network | asked | times faster | MACs | parameters | top-1 | dense | agreement |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
"""


def main() -> None:
    """Make the rows that are missing, and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["speed", "accuracy"])
    parser.add_argument("--config", type=Path, default=HERE / "runtimes.yaml")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--only", default="", help="text in the names of the networks to do")
    parser.add_argument("--runtime", action="append")
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--threads", type=int, action="append")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    config = yaml.safe_load(options.config.read_text())
    target = options.out / "runtimes.json"
    result: dict[str, Any] = {"benchmark": "runtimes", "speed": [], "accuracy": []}
    result |= json.loads(target.read_text()) if target.is_file() else {}
    rows = speed(config, options, result["speed"]) if options.part == "speed" else accuracy(config, options, result)
    for row in rows:
        result[options.part].append(row)
        result |= {"config": config, "environment": environment(torch.device("cpu")).model_dump(mode="json")}
        write_text(target, json.dumps(result, indent=1) + "\n")
        write_text(target.with_suffix(".md"), table(result))
        print(json.dumps(row), flush=True)


def speed(config: dict[str, Any], options: argparse.Namespace, done: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield a row for every network, runtime, batch and number of threads."""
    own = config["speed"]
    known = {(row["network"], row["runtime"], row["batch"], row["threads"]) for row in done}
    for network in own["networks"]:
        if options.only not in network["name"]:
            continue
        for runtime in options.runtime or own["runtimes"]:
            for batch in options.batch or own["batches"]:
                for threads in options.threads or own["threads"]:
                    if (network["name"], runtime, batch, threads) not in known:
                        torch.set_num_threads(threads)
                        yield speed_row(config, network, runtime, batch)


def speed_row(config: dict[str, Any], network: dict[str, Any], runtime: str, batch: int) -> dict[str, Any]:
    """Return what came of one network in one runtime."""
    subject = build(**network, batch=batch)
    own, start = config["speed"], time.perf_counter()
    recipe = Recipe(budget={"latency": own["budget"]}, formats=own["formats"], runtime=runtime, seed=config["seed"])
    row = {"network": network["name"], "runtime": runtime, "batch": batch, "threads": torch.get_num_threads()}
    try:
        target = Target.of(recipe, subject.model, subject.inputs, Runtime())
        options = tabulate(subject.model, profile(subject.model, subject.inputs), recipe, target=target)
        search = LatencySearch(strict=False, rounds=3, seconds=config["seconds"] / 2)
        found = plan_within_latency(subject.model, options, subject.inputs, target, search)
    except BudgetError as error:
        return row | {"refused": str(error), "seconds": time.perf_counter() - start}
    small = with_structure(subject.model, found.plan)
    formats = {"before": found.before.memory_format, "after": found.after.memory_format}
    models = {"before": subject.model, "after": small}
    times = compare_latency(
        {name: target.ready(one, subject.inputs, formats[name]) for name, one in models.items()},
        seconds=config["seconds"],
        threads=target.at.threads,
    )
    fewer = found.plan.before.macs / found.plan.after.macs
    speedup = times.speedups["after"]
    return row | {
        "dense": times.latencies["before"].model_dump(mode="json"),
        "compressed": times.latencies["after"].model_dump(mode="json"),
        "speedup": speedup.model_dump(mode="json"),
        "fewer_macs": fewer,
        "gained": speedup.ratio / fewer,
        "slower": sorted(found.returned),
        "formats": counted(found.plan),
        "seconds": time.perf_counter() - start,
    }


def counted(plan: Any) -> dict[str, int]:
    """Return how many layers of a plan have each format."""
    formats = [str(layer.format) for layer in plan.factorized]
    return {name: formats.count(name) for name in sorted(set(formats))}


def accuracy(config: dict[str, Any], options: argparse.Namespace, result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a row for every network and speed."""
    own = config["accuracy"]
    torch.set_num_threads(own["threads"])
    for name, speeds in own["networks"].items():
        known = {row["asked"] for row in result["accuracy"] if row["network"] == name}
        missing = [asked for asked in speeds if asked not in known]
        if options.only not in name or not missing:
            continue
        model, data, test, labels = subject_of(name, config, options)
        yield from accuracy_rows(name, model, data, test, labels, missing, config)


def subject_of(
    name: str, config: dict[str, Any], options: argparse.Namespace
) -> tuple[nn.Module, list[Tensor], list[Tensor], Tensor]:
    """Return a trained network, inputs to calibrate on, and inputs to test on with their labels."""
    if name == "mobilenet_v2":
        images, labels = photographs(options.images)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(config["seed"]))
        known, asked = order[:250], order[250:]
        return mobilenet(options.weights), [*images[known].split(50)], [*images[asked].split(50)], labels[asked]
    task = load_task(f"cifar10:{name}", seed=config["seed"])
    data = list(task.calibration_batches(config["calibration"], batch_size=125, seed=config["seed"]))
    test = list(task.test_batches(None, batch_size=250))
    model = task.dense(options.weights / f"{name}.safetensors")
    return model, data, [x for x, _ in test], torch.cat([y for _, y in test])


def accuracy_rows(
    name: str,
    model: nn.Module,
    data: list[Tensor],
    test: list[Tensor],
    labels: Tensor,
    speeds: list[float],
    config: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Yield what comes of each speed; all are chosen from one table."""
    own = config["accuracy"]
    inputs = data[0][: own["batch"]]
    runtime = Runtime(latency_inputs=inputs, measure=False)
    decision, dense = None, top1(model, test, labels)
    for asked in speeds:
        start = time.perf_counter()
        recipe = Recipe(budget={"latency": 1 / asked}, runtime=own["runtime"], seed=config["seed"])
        if decision is None or decision.table is None:
            decision = decide(model, data[0][:1], recipe, data=data, runtime=runtime)
        else:
            table = decision.table.replace(recipe=recipe)
            found = plan_within_latency(model, table, inputs, decision.target)
            decision = replace(decision, plan=found.plan, timed=found, recipe=recipe)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            small = carry_out(model, decision, runtime=runtime).model
        ready = runtime_named(own["runtime"]).ready
        times = compare_latency(
            {
                key: ready(one, inputs, "contiguous", own["threads"])
                for key, one in (("dense", model), ("small", small))
            },
            seconds=config["seconds"],
        )
        plan = decision.plan
        yield {
            "network": name,
            "asked": asked,
            "speedup": times.speedups["small"].model_dump(mode="json"),
            "macs": plan.after.macs / plan.before.macs,
            "params": plan.after.params / plan.before.params,
            "score": top1(small, test, labels),
            "dense": dense,
            "agreement": agreement(model, small, test, held_out=True).top1,
            "formats": counted(plan),
            "seconds": time.perf_counter() - start,
        }


@torch.no_grad()
def top1(model: nn.Module, test: list[Tensor], labels: Tensor) -> float:
    """Return the share of test inputs that the model gives the right class."""
    found = torch.cat([model(x).argmax(1) for x in test])
    return float((found == labels).double().mean())


def table(result: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    text = HEAD
    if result["speed"]:
        text += SPEED + "".join(map(speed_line, result["speed"])) + "\n"
    if result["accuracy"]:
        text += ACCURACY + "".join(map(accuracy_line, result["accuracy"])) + "\n"
    return text.rstrip() + "\n"


def speed_line(row: dict[str, Any]) -> str:
    head = f"| {row['network'].partition(':')[2]} | {row['runtime']} | {row['batch']} | {row['threads']} |"
    if "refused" in row:
        return f"{head} | | | | stays dense |\n"
    s = row["speedup"]
    return (
        f"{head} {row['dense']['median_ms']:.2f} | {s['ratio']:.2f} [{s['low']:.2f}–{s['high']:.2f}] | "
        f"{row['fewer_macs']:.2f} | {row['gained']:.2f} | {len(row['slower'])} |\n"
    )


def accuracy_line(row: dict[str, Any]) -> str:
    s, shares = row["speedup"], " | ".join(f"{row[key]:.1%}" for key in ("macs", "params"))
    scores = " | ".join(f"{row[key]:.2%}" for key in ("score", "dense", "agreement"))
    faster = f"{s['ratio']:.2f} [{s['low']:.2f}–{s['high']:.2f}]"
    return f"| {row['network']} | {row['asked']:.2f} | {faster} | {shares} | {scores} |\n"


if __name__ == "__main__":
    main()
