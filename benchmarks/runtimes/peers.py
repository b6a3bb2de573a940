"""What others keep at the speeds of the accuracy table: one knob each, turned until the clock shows the speed.

    python -m benchmarks.runtimes.peers --weights FOLDER --images FOLDER [--only NAME] [--pruning FOLDER]

Uniform SVD and uniform spatial SVD are made here, from the weights alone. Torch-Pruning is a package of its own, which
``pip install --no-deps --target FOLDER torch-pruning==1.6.1`` puts into a folder for ``--pruning``; without it those
rows are left out. Batch norms of all are estimated again from the calibration images. Taylor importance is that of the
dense network's own decisions: the images have no labels. Adds to ``runtimes.json`` and ``runtimes.md``.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from benchmarks.runtimes.run import HERE, Row, subject_of, table, top1
from benchmarks.trials import RESULTS
from tenfold import Recipe, Runtime, compress
from tenfold.profiling import compare_latency, environment, profile
from tenfold.records import write_text
from tenfold.runtimes import runtime_named
from tenfold.surgery import reestimate_batchnorm_

Make = Callable[[nn.Module, list[Tensor], float], nn.Module]
_TURNS = 7  # of the knob: a hundredth of its range
_SECONDS = 2.0  # of timing at each turn


def main() -> None:
    """Make the rows that are missing, and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "runtimes.yaml")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--only", default="", help="text in the names of the networks to do")
    parser.add_argument("--pruning", type=Path, help="folder that holds the package torch_pruning")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    config = yaml.safe_load(options.config.read_text())
    target = options.out / "runtimes.json"
    result: Row = json.loads(target.read_text())
    for row in rows(config, options, result.setdefault("peers", [])):
        result["peers"].append(row | {"processor": environment().device_name})
        write_text(target, json.dumps(result, indent=1) + "\n")
        write_text(target.with_suffix(".md"), table(result))
        print(json.dumps(row), flush=True)


def rows(config: Row, options: argparse.Namespace, done: list[Row]) -> Iterator[Row]:
    """Yield what each peer keeps of each network at each speed."""
    place = config["accuracy"]
    torch.set_num_threads(place["threads"])
    known = {(row["network"], row["method"], row["asked"]) for row in done}
    for network, speeds in place["networks"].items():
        if options.only not in network:
            continue
        model, data, test, labels = subject_of(network, config, options)
        for method, make in methods(options.pruning).items():
            for asked in speeds:
                if (network, method, asked) in known:
                    continue
                small, found = at_speed(model, data, make, asked, config)
                yield {"network": network, "method": method, **found, "score": top1(small, test, labels)}


def at_speed(model: nn.Module, data: list[Tensor], make: Make, asked: float, config: Row) -> tuple[nn.Module, Row]:
    """Return the mildest result of a method that is as fast as asked, by bisection of its knob, and its figures."""
    place, inputs = config["accuracy"], data[0][: config["accuracy"]["batch"]]
    ready = runtime_named(place["runtime"]).ready
    dense, whole = ready(model, inputs, "contiguous", place["threads"]), profile(model, inputs[:1])

    def measured(small: nn.Module, seconds: float) -> Any:
        made = ready(small, inputs, "contiguous", place["threads"])
        return compare_latency({"dense": dense, "small": (made[0], inputs)}, seconds=seconds).speedups["small"]

    low, high, best = 0.02, 1.0, None  # shares of what the knob turns
    for _ in range(_TURNS):
        share = (low + high) / 2
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            small = make(model, data, share)
        if measured(small, _SECONDS).ratio >= asked:
            low, best = share, small
        else:
            high = share
    if best is None:
        best = make(model, data, low)
    cost = profile(best, inputs[:1])
    found = {"asked": asked, "speedup": measured(best, config["seconds"]).model_dump(mode="json")}
    return best, found | {"macs": cost.macs / whole.macs, "params": cost.params / whole.params}


def methods(pruning: Path | None) -> dict[str, Make]:
    """Return the peers by name."""
    found: dict[str, Make] = {"uniform SVD": uniform("low_rank"), "uniform spatial SVD": uniform("spatial")}
    if pruning is not None:
        sys.path.insert(0, str(pruning))
        found |= {"Torch-Pruning, magnitude": pruned("magnitude"), "Torch-Pruning, Taylor": pruned("taylor")}
    return found


def uniform(format: str) -> Make:
    """Return what gives every layer the same share of its ranks, by the weights alone."""

    def make(model: nn.Module, data: list[Tensor], share: float) -> nn.Module:
        recipe = Recipe.of(
            {"rule": {"name": "ratio", "share": share}, "formats": [format], "calibration": {"method": "batchnorm"}}
        )
        return compress(model, data[0][:1], recipe, data=data, runtime=Runtime(measure=False)).model

    return make


def pruned(importance: str) -> Make:
    """Return what keeps the same share of the channels in every block; those of the residual stream all stay."""

    def make(model: nn.Module, data: list[Tensor], share: float) -> nn.Module:
        import torch_pruning

        small = copy.deepcopy(model).eval()
        by = torch_pruning.importance
        measure = by.GroupTaylorImportance() if importance == "taylor" else by.GroupMagnitudeImportance(p=2)
        pruner = torch_pruning.pruner.BasePruner(
            small, data[0][:1], importance=measure, pruning_ratio=1 - share, ignored_layers=ends_of_blocks(small)
        )
        if importance == "taylor":
            for x in data:
                logits = small(x)
                nn.functional.cross_entropy(logits, logits.detach().argmax(1)).backward()
        pruner.step()
        small.zero_grad(set_to_none=True)
        reestimate_batchnorm_(small, data)
        return small

    return make


def ends_of_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the layers whose outputs are logits or enter the residual stream, and the stem."""
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    ends = [m for name, m in model.named_modules() if name.endswith("conv2") and isinstance(m, nn.Conv2d)]
    # Of inverted bottlenecks the last convolution is pointwise, from many channels to few.
    ends += [m for m in convs if m.groups == 1 and m.kernel_size == (1, 1) and m.out_channels < m.in_channels]
    return [convs[0], *ends, *(m for m in model.modules() if isinstance(m, nn.Linear))]


if __name__ == "__main__":
    main()
