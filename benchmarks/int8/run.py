"""Compress, then quantize: bytes, latency in ONNX Runtime and accuracy at each step; and ONNX latency of ResNet-18.

    python -m benchmarks.int8.run --weights-dir FOLDER [--checkpoint FOLDER] [--limit N] [--threads N] [--only TEXT]

``--checkpoint`` takes a compressed (and recovered) ResNet-56 instead of compressing one here. Accuracy is that of the
files, in ONNX Runtime, on the whole test set unless ``--limit`` says otherwise; ranges come from training images. All
files are timed in turns, by processor time where other processes leave no choice. Writes ``int8.json`` and ``int8.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from benchmarks.zoo import build
from tenfold import Recipe, Runtime, compress, load
from tenfold.exporting import ExportConfig, export, open_exported, quantize_onnx
from tenfold.profiling import Comparison, compare_latency, environment
from tenfold.records import Speedup
from tenfold.tasks import Task, load_task

HERE = Path(__file__).parent
HEAD = """\
# Compress, then int8

`python -m benchmarks.int8.run` on {device}, torch {torch}, ONNX Runtime {ort}, {threads} threads; load
when it began {load:.1f}. Each row is an ONNX file with batch norm fused. *ms*: of the wall, or *p*, of the processor.
*Speed-up*: over the first file of its network, the median of rounds in turns with its 95 % interval. *Top-1*: of the
file in ONNX Runtime, on {tested} test images.

| network | file | bytes | ms, batch {batch} | speed-up | top-1 |
|---|---|---:|---:|---:|---:|
"""


def main() -> None:
    """Do the recipe and the networks of the zoo, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "int8.yaml")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results")
    parser.add_argument("--weights-dir", type=Path, required=True, help="folder with the dense weights")
    parser.add_argument(
        "--checkpoint", type=Path, help="a compressed model of the task, instead of compressing it here"
    )
    parser.add_argument("--limit", type=int, help="so many test images at most: to try the script out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, help="of each comparison; by default as configured")
    parser.add_argument("--only", default="", help="text in the names of the networks to do")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = yaml.safe_load(options.config.read_text())
    config |= {"seconds": options.seconds or config["seconds"]}
    load_before, rows = os.getloadavg()[0], []
    with tempfile.TemporaryDirectory() as folder:
        if options.only in config["recipe"]["task"]:
            rows += recipe(config, options, Path(folder))
        for wanted in config["zoo"]:
            if options.only in wanted["name"]:
                rows += zoo(wanted, config, Path(folder))
    made = environment().model_dump(mode="json")
    made["versions"]["onnxruntime"] = __import__("onnxruntime").__version__
    result = {
        "benchmark": "int8",
        "config": config,
        "checkpoint": str(options.checkpoint.name) if options.checkpoint else None,
        "limit": options.limit,
        "load": load_before,
        "rows": rows,
        "environment": made,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "int8.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.out / "int8.md").write_text(table(result))
    print(table(result))


def recipe(config: dict[str, Any], options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Return the rows of fp32, compressed, int8 alone, and compressed with int8."""
    wanted = config["recipe"]
    task = load_task(wanted["task"])
    dense = task.dense(options.weights_dir / wanted["weights"])
    models = {"dense": dense, "compressed": compressed(task, dense, wanted, options.checkpoint)}
    ranges = list(task.calibration_batches(wanted["ranges"], batch_size=64, seed=0))
    files = {}
    for name, model in models.items():
        for suffix in ("", " int8"):
            files[name + suffix] = folder / f"{name}{suffix.replace(' ', '-')}.onnx"
        export(model, task.example_inputs(1), files[name], config=ExportConfig(seconds=0))
        quantize_onnx(files[name], files[f"{name} int8"], ranges, seconds=0)
    scores = {name: task.evaluate(open_exported(file), limit=options.limit) for name, file in files.items()}
    scores["dense in torch"] = task.evaluate(dense, limit=options.limit)
    inputs = task.example_inputs(wanted["batch"])
    return rows_of(wanted["task"], files, timed(files, inputs, config), scores)


def compressed(task: Task, dense: nn.Module, wanted: dict[str, Any], checkpoint: Path | None) -> nn.Module:
    """Return the compressed network: read from a folder, or made here from unlabeled images without any training."""
    if checkpoint is not None:
        return load(task.build(), checkpoint)[0].eval()
    data = task.calibration_batches(wanted["calibration"], batch_size=125, seed=0)
    made = compress(
        dense, task.example_inputs(1), Recipe(budget=wanted["budget"]), data=data, runtime=Runtime(measure=False)
    )
    return made.model.eval()


def zoo(wanted: dict[str, Any], config: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a network with random weights, dense and compressed: the time does not depend on them."""
    subject = build(wanted["name"], batch=wanted["batch"])
    recipe, runtime = Recipe(budget=wanted["budget"]), Runtime(measure=False)
    small = compress(subject.model, subject.inputs, recipe, runtime=runtime).model
    files = {}
    for name, model in (("dense", subject.model), ("compressed", small)):
        files[name] = folder / f"zoo-{name}.onnx"
        # Noise of a network that was never trained grows from layer to layer: a looser bound, still one.
        export(model, subject.inputs, files[name], config=ExportConfig(seconds=0, tolerance=1e-3), overwrite=True)
    return rows_of(wanted["name"], files, timed(files, subject.inputs, config), {})


def timed(files: dict[str, Path], inputs: Any, config: dict[str, Any]) -> Comparison:
    """Return the latencies of the files in ONNX Runtime, measured in turns."""
    opened = {name: (open_exported(file), inputs) for name, file in files.items()}
    return compare_latency(opened, seconds=config["seconds"])


def rows_of(network: str, files: dict[str, Path], found: Comparison, scores: dict[str, float]) -> list[dict[str, Any]]:
    """Return a row for each file, and one for the dense network in torch where that was scored."""
    rows: list[dict[str, Any]] = [
        {
            "network": network,
            "file": name,
            "bytes": file.stat().st_size,
            "latency": found.latencies[name].model_dump(mode="json"),
            "speedup": found.speedups[name].model_dump(mode="json"),
            "score": scores.get(name),
        }
        for name, file in files.items()
    ]
    if "dense in torch" in scores:
        rows.insert(0, {"network": network, "file": "dense in torch", "score": scores["dense in torch"]})
    return rows


def table(result: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    made, config = result["environment"], result["config"]
    head = HEAD.format(
        device=made["device_name"] or made["device"],
        torch=made["torch"],
        ort=made["versions"]["onnxruntime"],
        threads=made["threads"],
        load=result["load"],
        batch=config["recipe"]["batch"],
        tested=f"the first choice of {result['limit']}" if result["limit"] else "all 10,000",
    )
    return head + "".join(line(row) for row in result["rows"])


def line(row: dict[str, Any]) -> str:
    """Return one file as a line of the table."""
    score = "" if row["score"] is None else f"{row['score']:.2%}"
    if "bytes" not in row:
        return f"| {row['network']} | {row['file']} | | | | {score} |\n"
    times, speedup = row["latency"], row["speedup"]
    ratio = Speedup(**speedup).in_doubt or f"{speedup['ratio']:.2f} [{speedup['low']:.2f}–{speedup['high']:.2f}]"
    ms = f"{times['median_ms']:.2f}{' *p*' if times.get('clock') == 'processor' else ''}"
    return f"| {row['network']} | {row['file']} | {row['bytes']:,} | {ms} | {ratio} | {score} |\n"


if __name__ == "__main__":
    main()
