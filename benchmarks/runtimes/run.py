"""Dense against compressed in the runtime that runs them: speed, and accuracy at equal speed.

    python -m benchmarks.runtimes.run speed [--weights FOLDER] [--only TEXT] [--runtime NAME] [--batch N] [--threads N]
    python -m benchmarks.runtimes.run accuracy --weights FOLDER --images FOLDER [--only NAME]
    python -m benchmarks.runtimes.run int8 --weights FOLDER --images FOLDER [--only NAME]

``--weights`` holds ``resnet20.safetensors``, ``resnet56.safetensors`` and ``mobilenet_v2.safetensors``; ``--images``
photographs NNNN.jpg as ``benchmarks.certainty`` takes them. Writes ``runtimes.json`` and ``runtimes.md`` after every
row; rows that are there are not repeated. Wants a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
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
from benchmarks.zoo import Subject, build
from tenfold import Recipe, Runtime
from tenfold.errors import BudgetError
from tenfold.exporting import ExportConfig, export, open_exported, quantize_onnx
from tenfold.pipeline import carry_out
from tenfold.planning import LatencySearch, decide
from tenfold.planning.latency_budget import plan_within_latency, with_structure
from tenfold.planning.tabulate import tabulate
from tenfold.planning.target import Target
from tenfold.planning.unroll import unroll_for_plan
from tenfold.profiling import agreement, compare_latency, environment, profile
from tenfold.records import OptionTable, write_text
from tenfold.runtimes import runtime_named
from tenfold.runtimes.program import at_batch
from tenfold.tasks import load_task

Row = dict[str, Any]

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

| network | runtime | batch | threads | dense ms | times faster | times fewer MACs | gained | slower | on |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |
"""
ACCURACY = """\
## Accuracy at a speed

Untrained, from unlabeled samples; ONNX Runtime, batch 8, one thread. *Asked*: how many times faster, by a latency
budget.

| network | asked | times faster | MACs | parameters | top-1 | dense | agreement |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
"""
PEERS = """\
## What others keep at these speeds

One knob each, turned until ONNX Runtime shows the speed (batch 8, one thread); batch norms estimated again from the
same unlabeled images. `python -m benchmarks.runtimes.peers`.

| network | asked | method | times faster | MACs | parameters | top-1 |
| --- | ---: | --- | ---: | ---: | ---: | ---: |
"""
INT8 = """\
## Eight bits

Planned by the clock of int8 for so many times the speed of the dense network in int8, untrained, then quantized.
*Faster* and *bytes* are over the dense int8 file; *top-1* is that of the files, in floating point and in int8.

| network | faster | MACs | bytes | dense top-1 | compressed top-1 |
| --- | ---: | ---: | ---: | ---: | ---: |
"""


def main() -> None:
    """Make the rows that are missing, and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["speed", "accuracy", "int8"])
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
    result: Row = {"benchmark": "runtimes", "speed": [], "accuracy": [], "int8": []}
    result |= json.loads(target.read_text()) if target.is_file() else {}
    parts = {"speed": speed, "accuracy": accuracy, "int8": int8}
    rows = parts[options.part](config, options, result[options.part])
    for row in rows:
        row["processor"] = environment().device_name  # rows that were made on another machine stay
        result[options.part].append(row)
        result |= {"config": config, "environment": environment(torch.device("cpu")).model_dump(mode="json")}
        write_text(target, json.dumps(result, indent=1) + "\n")
        write_text(target.with_suffix(".md"), table(result))
        print(json.dumps(row), flush=True)


def speed(config: Row, options: argparse.Namespace, done: list[Row]) -> Iterator[Row]:
    """Yield a row for every network, runtime, batch and number of threads."""
    own = config["speed"]
    known = {(row["network"], row["runtime"], row["batch"], row["threads"]) for row in done}
    tables: dict[tuple[Any, ...], OptionTable] = {}  # a table depends on neither batch nor threads
    for network in own["networks"]:
        name, made = network.get("label", network["name"]), {k: v for k, v in network.items() if k != "label"}
        if options.only not in name:
            continue
        for runtime in options.runtime or own["runtimes"]:
            for batch in options.batch or own["batches"]:
                for threads in options.threads or own["threads"]:
                    if (name, runtime, batch, threads) not in known:
                        torch.set_num_threads(threads)
                        subject = trained(name, batch, options.weights) or build(**made, batch=batch)
                        yield speed_row(config, replace(subject, name=name), runtime, batch, tables)


def trained(name: str, batch: int, weights: Path | None) -> Subject | None:
    """Return a trained network of ``weights`` with noise for inputs; None for one that has random weights."""
    family, _, variant = name.partition(":")
    if family != "trained":
        return None
    if weights is None:
        sys.exit(f"{name} needs --weights FOLDER with {variant}.safetensors")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if variant == "mobilenet_v2":
            return Subject(name, mobilenet(weights), torch.randn(batch, 3, 224, 224))
        model = load_task(f"cifar10:{variant}").dense(weights / f"{variant}.safetensors")
        return Subject(name, model, torch.randn(batch, 3, 32, 32))


def speed_row(
    config: Row, subject: Subject, runtime: str, batch: int, tables: dict[tuple[Any, ...], OptionTable]
) -> Row:
    """Return what came of one network in one runtime."""
    own, start = config["speed"], time.perf_counter()
    recipe = Recipe(budget={"latency": own["budget"]}, formats=own["formats"], runtime=runtime, seed=config["seed"])
    row = {"network": subject.name, "runtime": runtime, "batch": batch, "threads": torch.get_num_threads()}
    try:
        model = unroll_for_plan(subject.model, recipe, subject.inputs)
        target = Target.of(recipe, model, subject.inputs, Runtime())
        steps = {str(layer.spec): target.step_of(layer.spec) for layer in target.profile.layers if layer.spec}
        key = (subject.name, *sorted(steps.items()))
        if key not in tables:
            tables[key] = tabulate(model, profile(model, at_batch(subject.inputs, 1)), recipe, target=target)
        search = LatencySearch(strict=False, rounds=3, seconds=config["seconds"] / 2)
        options = tables[key].replace(recipe=recipe)
        found = plan_within_latency(model, options, subject.inputs, target, search)
    except BudgetError as error:
        return row | {"refused": str(error), "seconds": time.perf_counter() - start}
    small = with_structure(model, found.plan)
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


def accuracy(config: Row, options: argparse.Namespace, done: list[Row]) -> Iterator[Row]:
    """Yield a row for every network and speed."""
    own = config["accuracy"]
    torch.set_num_threads(own["threads"])
    for name, speeds in own["networks"].items():
        known = {row["asked"] for row in done if row["network"] == name}
        missing = [asked for asked in speeds if asked not in known]
        if options.only not in name or not missing:
            continue
        model, data, test, labels = subject_of(name, config, options)
        yield from accuracy_rows(name, model, data, test, labels, missing, config)


def subject_of(
    name: str, config: Row, options: argparse.Namespace
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
    config: Row,
) -> Iterator[Row]:
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


def int8(config: Row, options: argparse.Namespace, done: list[Row]) -> Iterator[Row]:
    """Yield a row for every network: planned by the clock of int8, quantized, against the dense network quantized."""
    own, place = config["int8"], config["accuracy"]
    torch.set_num_threads(place["threads"])
    for name in own["networks"]:
        if options.only in name and name not in {row["network"] for row in done}:
            yield int8_row(name, subject_of(name, config, options), config)


def int8_row(name: str, subject: tuple[nn.Module, list[Tensor], list[Tensor], Tensor], config: Row) -> Row:
    """Return what came of a network in eight bits."""
    (model, data, test, labels), start = subject, time.perf_counter()
    inputs = data[0][: config["accuracy"]["batch"]]
    recipe = Recipe(budget={"latency": 1 / config["int8"]["speedup"]}, runtime="onnxruntime-int8", seed=config["seed"])
    runtime = Runtime(latency_inputs=inputs, measure=False)
    try:
        decision = decide(model, data[0][:1], recipe, data=data, runtime=runtime)
    except BudgetError as error:
        return {"network": name, "refused": str(error), "seconds": time.perf_counter() - start}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = carry_out(model, decision, runtime=runtime).model
    with tempfile.TemporaryDirectory() as folder:
        files, found = {}, {}
        for key, one in (("dense", model), ("small", small)):
            real, files[key] = Path(folder) / f"{key}.onnx", Path(folder) / f"{key}-int8.onnx"
            export(one, inputs[:1], real, config=ExportConfig(seconds=0))
            quantize_onnx(real, files[key], data[: -(-512 // len(data[0]))], seconds=0)
            found[key] = {"real": top1(open_exported(real), test, labels)}
        opened = {key: open_exported(file) for key, file in files.items()}
        times = compare_latency({key: (one, inputs) for key, one in opened.items()}, seconds=config["seconds"])
        for key, one in opened.items():
            found[key] |= {"bytes": files[key].stat().st_size, "score": top1(one, test, labels)}
    return {
        "network": name,
        **found,
        "speedup": times.speedups["small"].model_dump(mode="json"),
        "macs": decision.plan.after.macs / decision.plan.before.macs,
        "formats": counted(decision.plan),
        "seconds": time.perf_counter() - start,
    }


@torch.no_grad()
def top1(model: nn.Module, test: list[Tensor], labels: Tensor) -> float:
    """Return the share of test inputs that the model gives the right class."""
    found = torch.cat([model(x).argmax(1) for x in test])
    return float((found == labels).double().mean())


def table(result: Row) -> str:
    """Return the results as Markdown."""
    text = HEAD
    if result["speed"]:
        text += SPEED + "".join(map(speed_line, result["speed"])) + "\n"
    if result["accuracy"]:
        text += ACCURACY + "".join(map(accuracy_line, result["accuracy"])) + "\n"
    if result.get("peers"):
        text += (
            PEERS + "".join(map(peer_line, sorted(result["peers"], key=lambda r: (r["network"], r["asked"])))) + "\n"
        )
    if result["int8"]:
        text += INT8 + "".join(map(int8_line, result["int8"])) + "\n"
    return text.rstrip() + "\n"


def peer_line(row: Row) -> str:
    s, shares = row["speedup"], " | ".join(f"{row[key]:.1%}" for key in ("macs", "params"))
    faster = f"{s['ratio']:.2f} [{s['low']:.2f}–{s['high']:.2f}]"
    return f"| {row['network']} | {row['asked']:.2f} | {row['method']} | {faster} | {shares} | {row['score']:.2%} |\n"


def int8_line(row: Row) -> str:
    if "refused" in row:
        reason, _, _ = row["refused"].partition(". What")
        return f"| {row['network']} | | | | | {reason} |\n"
    s, dense, small = row["speedup"], row["dense"], row["small"]
    faster, size = f"{s['ratio']:.2f} [{s['low']:.2f}–{s['high']:.2f}]", small["bytes"] / dense["bytes"]
    tops = f"{dense['real']:.2%} → {dense['score']:.2%} | {small['real']:.2%} → {small['score']:.2%}"
    return f"| {row['network']} | {faster} | {row['macs']:.1%} | {size:.2f} | {tops} |\n"


def speed_line(row: Row) -> str:
    head = f"| {row['network'].partition(':')[2]} | {row['runtime']} | {row['batch']} | {row['threads']} |"
    if "refused" in row:
        return f"{head} | | | | stays dense | {row['processor']} |\n"
    s = row["speedup"]
    return (
        f"{head} {row['dense']['median_ms']:.2f} | {s['ratio']:.2f} [{s['low']:.2f}–{s['high']:.2f}] | "
        f"{row['fewer_macs']:.2f} | {row['gained']:.2f} | {len(row['slower'])} | "
        f"{row['processor']} |\n"
    )


def accuracy_line(row: Row) -> str:
    s, shares = row["speedup"], " | ".join(f"{row[key]:.1%}" for key in ("macs", "params"))
    scores = " | ".join(f"{row[key]:.2%}" for key in ("score", "dense", "agreement"))
    faster = f"{s['ratio']:.2f} [{s['low']:.2f}–{s['high']:.2f}]"
    return f"| {row['network']} | {row['asked']:.2f} | {faster} | {shares} | {scores} |\n"


if __name__ == "__main__":
    main()
