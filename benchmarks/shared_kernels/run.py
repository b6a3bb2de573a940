"""Share kernels across the layers of trained residual networks, against factorizing layers one by one.

    python -m benchmarks.shared_kernels.run --weights FOLDER [--data FOLDER] [--only NETWORK] [--runs FOLDER] [--report]

FOLDER holds resnet20.safetensors and resnet56.safetensors, data are Parquet files: see tenfold/tasks/cifar10.py.
Nothing is trained. What is finished is kept in the folder of the runs. Layers one by one are what ``compress`` makes of
the same calibration samples and the same share of the parameters, at its defaults.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

import tenfold
from benchmarks.trials import RESULTS, Row, finished
from tenfold import networks
from tenfold.profiling import environment
from tenfold.records import write_text
from tenfold.surgery.share_kernels import bank_ranks, equal_kernels, share_kernels, unshare_kernels
from tenfold.tasks import Task, load_task

HERE = Path(__file__).parent


def main() -> None:
    """Compress and score what is not finished yet, and write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs") / "shared_kernels")
    parser.add_argument("--only", action="append", help="a network; may be repeated")
    parser.add_argument("--report", action="store_true", help="compress nothing, write what there is")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = yaml.safe_load((HERE / "shared_kernels.yaml").read_text())
    for name in () if options.report else options.only or config["networks"]:
        one_network(name, config, options)
    rows = [json.loads(file.read_text()) for file in sorted(options.runs.glob("*/run.json"))]
    result = {"benchmark": "shared_kernels", "config": config, "runs": rows}
    result["environment"] = environment(torch.device("cpu")).model_dump(mode="json")
    write_text(options.out / "shared_kernels.json", json.dumps(result, indent=1) + "\n")
    page = table(result)
    write_text(options.out / "shared_kernels.md", page)
    print(page)


def one_network(name: str, config: Row, options: argparse.Namespace) -> None:
    """Make all variants of one network, each kept when it is finished."""
    task = load_task(f"cifar10:{name}", data=options.data, seed=config["seed"])
    dense = task.dense(options.weights / f"{name}.safetensors")
    batches = list(task.calibration_batches(config["calibration"], batch_size=125, seed=config["seed"]))
    cost = tenfold.profile(dense, task.example_inputs(1))
    own = {path for paths in equal_kernels(dense).values() for path in paths}
    specs = {layer.path: layer.spec for layer in cost.layers if layer.spec is not None and layer.path in own}
    print(json.dumps(finished(options.runs / name, lambda: scored(task, dense, "dense", name))), flush=True)
    moments: dict[str, Any] = {}
    for share in config["networks"][name]:
        for variant, how in config["variants"].items():
            if "bank" in how and not moments:
                moments |= tenfold.calibrate(dense, batches, specs, seed=config["seed"])
            limit = round(share * cost.params)
            make = partial(one_by_one, dense, task, how, limit, batches)
            if "bank" in how:
                kind = getattr(networks, how["bank"])
                make = partial(share_kernels, dense, limit, moments=moments, kind=kind, steps=config["steps"])
            folder = options.runs / f"{name}-{share}-{variant.replace(' ', '-')}"
            row = finished(folder, partial(compressed, task, make, {"share": share}, variant, name))
            print(json.dumps(row), flush=True)


def one_by_one(dense: nn.Module, task: Task, how: Row, limit: int, batches: list[Any]) -> nn.Module:
    """Return what ``compress`` makes of the network."""
    recipe: Row = {"budget": f"max_params={limit}", "formats": how["formats"], "units": [], "seed": task.seed}
    if "method" in how:
        recipe["calibration"] = {"method": how["method"]}
    quiet = tenfold.Runtime(measure=False)
    return tenfold.compress(dense, task.example_inputs(1), recipe, data=batches, runtime=quiet).model


def compressed(task: Task, make: Any, more: Row, variant: str, name: str) -> Row:
    """Return the row of a compressed network; where there are none so small, why."""
    start = time.perf_counter()
    try:
        model = make()
    except tenfold.errors.BudgetError as error:
        return {"network": name, "variant": variant, **more, "refused": str(error)}
    seconds = time.perf_counter() - start
    return scored(task, model, variant, name) | more | {"seconds": seconds}


def scored(task: Task, model: nn.Module, variant: str, name: str) -> Row:
    """Return parameters, multiplications as it runs and once cores are multiplied out, ranks, and the test score."""
    x = task.example_inputs(1)
    return {
        "network": name,
        "variant": variant,
        "params": sum(p.numel() for p in model.parameters()),
        "macs": tenfold.profile(unshare_kernels(model), x).macs,
        "macs_shared": tenfold.profile(model, x).macs,
        "ranks": bank_ranks(model),
        "test": task.evaluate(model),
    }


def table(result: Row) -> str:
    """Return the Markdown page."""
    config, runs = result["config"], result["runs"]
    lines = [HEAD.format(**config, torch=result["environment"]["torch"])]
    whole = {run["network"]: run for run in runs if run["variant"] == "dense"}
    for name, dense in whole.items():
        lines += ["", f"## {name}", "", f"{dense['params']:,} parameters, top-1 {100 * dense['test']:.2f}.", "", ROWS]
        for share in config["networks"][name]:
            own = {run["variant"]: run for run in runs if run["network"] == name and run.get("share") == share}
            for variant in config["variants"]:
                if variant in own:
                    lines.append(line(own[variant], dense))
    return "\n".join(lines) + "\n"


def line(run: Row, dense: Row) -> str:
    """Return the row of a run."""
    if "refused" in run:
        return f"| {run['share']:.0%} | {run['variant']} | does not go so low | | | |"
    ranks = "; ".join(" ".join(map(str, ranks.values())) for ranks in run["ranks"].values())
    cells = [f"{run['share']:.0%}", run["variant"], f"{run['params']:,}", f"{run['macs'] / dense['macs']:.2f}"]
    cells += [f"{100 * run['test']:.2f}", ranks]
    return f"| {' | '.join(cells)} |"


HEAD = """\
# One tensor for the kernels of many layers

`python -m benchmarks.shared_kernels.run --weights FOLDER`, torch {torch}, one thread, seed {seed}. Trained ResNets of
CIFAR-10 at equal numbers of parameters, all of the network counted, shared factors once. *tucker2* and *cp3*: layers
one by one, by `compress` at its defaults, which fit each to what the compressed layers before it pass on; *alone*: each
to its inputs in the dense network, as banks are. *shared*: kernels of one shape as one tensor, ranks by `choose_ranks`,
fitted together by {steps} steps at most. The same {calibration:,} training pictures calibrate all. Nothing is trained;
top-1 on all 10,000 test pictures, in percent. MACs as a share of the dense network's, cores multiplied out once."""
ROWS = """\
| parameters | kernels | counted | MACs | top-1 | ranks of the banks: layers, out, in |
|---:|---|---:|---:|---:|---|"""


if __name__ == "__main__":
    main()
