"""Rewrite the factorized convolutions of a trained ResNet-20 as blocks, and compare the class scores.

    python -m benchmarks.architectures.run --weights FOLDER [--data FOLDER]

FOLDER holds resnet20.safetensors, data are CIFAR-10's Parquet files: see tenfold/tasks/cifar10.py. Nothing is trained:
*in training mode* are the class scores with the blocks in training mode, where norms divide by the spread of the batch,
without and with statistics from the calibration samples.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

import tenfold
from benchmarks.trials import RESULTS, Row
from tenfold.networks import ConvBlock
from tenfold.profiling import environment
from tenfold.records import write_text
from tenfold.surgery import as_blocks
from tenfold.tasks import Task, load_task

HERE = Path(__file__).parent


def main() -> None:
    """Factorize and rewrite in each architecture; write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = yaml.safe_load((HERE / "architectures.yaml").read_text())
    task = load_task(f"cifar10:{config['network']}", data=options.data, seed=config["seed"])
    dense = task.dense(options.weights / f"{config['network']}.safetensors")
    rows = []
    for architecture, format in config["formats"].items():
        rows.append({"architecture": architecture, "format": format, **rewritten(task, dense, format, config)})
        print(json.dumps(rows[-1]), flush=True)
    result = {"benchmark": "architectures", "config": config, "rows": rows}
    result["environment"] = environment(torch.device("cpu")).model_dump(mode="json")
    write_text(options.out / "architectures.json", json.dumps(result, indent=1) + "\n")
    write_text(options.out / "architectures.md", table(result))


def rewritten(task: Task, dense: nn.Module, format: str, config: Row) -> Row:
    """Return what the blocks of one architecture cost, and how far their class scores are from the factorized ones."""
    data = list(task.calibration_batches(config["calibration"], batch_size=125, seed=config["seed"]))
    recipe = {"rule": config["rule"], "budget": config["budget"], "formats": format, "seed": config["seed"]}
    x = task.example_inputs(1)
    small = tenfold.compress(dense, x, recipe, runtime=tenfold.Runtime(measure=False)).model
    blind, settled = as_blocks(small), as_blocks(small, data)
    blocks = [module for module in settled.modules() if isinstance(module, ConvBlock)]
    return {
        "blocks": len(blocks),
        "params": sum(p.numel() for p in small.parameters()),
        "block_params": sum(p.numel() for p in settled.parameters()),
        "macs": tenfold.profile(small, x).macs,
        "block_macs": tenfold.profile(settled, x).macs,
        "difference": difference(task, small, settled, config["test"]),
        "training": difference(task, small, opened(blind), config["test"]),
        "training_settled": difference(task, small, opened(settled), config["test"]),
    }


def opened(model: nn.Module) -> nn.Module:
    """Return the model with its blocks in training mode."""
    for module in model.modules():
        if isinstance(module, ConvBlock):
            module.train()
            for norm in module.norms:
                norm.momentum = 0.0  # type: ignore[assignment]
    return model


@torch.no_grad()
def difference(task: Task, first: nn.Module, second: nn.Module, limit: int) -> float:
    """Return the relative distance of the class scores of test pictures."""
    gap = whole = 0.0
    for images, _ in task.test_batches(limit, batch_size=250):
        wanted: Any = first(images)
        gap += float((second(images) - wanted).square().sum())
        whole += float(wanted.square().sum())
    return (gap / whole) ** 0.5


def table(result: Row) -> str:
    """Return the Markdown page."""
    lines = [HEAD.format(**result["config"], torch=result["environment"]["torch"])]
    for row in result["rows"]:
        cells = [f"{row['architecture']} ({row['format']})", str(row["blocks"])]
        cells += [f"{row['params']:,}", f"{row['block_params']:,}", f"{row['block_macs'] / row['macs']:.3f}"]
        cells += [f"{row['difference']:.1e}", f"{row['training']:.2f}", f"{row['training_settled']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


HEAD = """\
# Factorized convolutions as blocks of architectures

`python -m benchmarks.architectures.run --weights FOLDER`, torch {torch}, one thread, seed {seed}. {network} factorized
to {budget} in each format, all layers at one rate, by its weights alone, nothing trained; then batch norms and PReLUs
between the stages, as identities. *Distance*: of the class scores of {test:,} test pictures from those of the
factorized network, relative. *In training mode*: with statistics of the norms at their defaults, and from
{calibration:,} training pictures. MACs are those of the blocks by those of the factorized network.

| architecture | blocks | parameters | as blocks | MACs | distance | in training mode | with data |
|---|---:|---:|---:|---:|---:|---:|---:|"""


if __name__ == "__main__":
    main()
