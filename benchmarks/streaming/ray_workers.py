"""Compare what two actors of Ray make of a streamed run, one of them killed in the middle, with what one process makes.

    python -m benchmarks.streaming.ray_workers [--config FILE] [--out FILE]

Ray is an instance of this machine, started here. Plans are compared layer by layer; weights by the largest difference
in a tensor, as a share of its largest number; outputs on the samples.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.streaming.run import written
from benchmarks.zoo import supply_torchvision_ops
from tenfold import Runtime, Workers
from tenfold.checkpoint import load_pretrained
from tenfold.errors import require
from tenfold.profiling import environment
from tenfold.streaming import Streamed, compress_streamed

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]


def main() -> None:
    """Run three times, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "ray_workers.yaml")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "streaming_ray_workers.json")
    options = parser.parse_args()
    config = yaml.safe_load(options.config.read_text())
    torch.set_num_threads(config["threads"])
    drawn = torch.Generator().manual_seed(config["seed"])
    size = (1, config["tokens"])
    data = [{"input_ids": torch.randint(config["words"], size, generator=drawn)} for _ in range(config["sequences"])]
    workers = Workers(config["actors"], "ray", config["threads"])
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        written(config, folder / "dense")

        def timed(name: str, runtime: Runtime) -> tuple[Streamed, float]:
            start = time.perf_counter()
            return compress_streamed(
                folder / "dense", folder / name, config["budget"], data=data, runtime=runtime
            ), time.perf_counter() - start

        alone, seconds = timed("alone", Runtime())
        found: dict[str, Any] = {"one process": {"seconds": seconds}}
        start_ray(config["actors"])
        killed: list[int] = []
        for name, on_event in (("two actors", None), ("two actors, one killed", killer(killed, config["blocks"] // 2))):
            other, seconds = timed(name.replace(" ", "_"), Runtime(workers=workers, on_event=on_event))
            found[name] = {"seconds": seconds, "killed": len(killed), **compared(alone, other, data)}
            print(name, json.dumps(found[name]), flush=True)
    result = {"benchmark": "streaming_ray_workers", "config": config, "runs": found}
    result["ray"] = require("ray", "ray").__version__
    result["environment"] = json.loads(environment().to_json())
    options.out.write_text(json.dumps(result, indent=1) + "\n")


def start_ray(actors: int) -> None:
    """Start an instance on this machine whose processes import what this one does."""
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    prepared: dict[str, Any] = {"env_vars": variables, "worker_process_setup_hook": supply_torchvision_ops}
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    require("ray", "ray").init(address="local", num_cpus=actors, runtime_env=prepared, **quiet)


def killer(killed: list[int], done: int) -> Callable[[Any], None]:
    """Return what kills an actor, once, when so many blocks are weighed."""

    def kill(event: Any) -> None:
        if event.step == "weigh blocks" and event.done == done and not killed:
            killed.append(actors()[0])
            os.kill(killed[0], signal.SIGKILL)

    return kill


def actors() -> list[int]:
    """Return the processes of this machine that are actors of a run, by their titles, the youngest first."""
    found = []
    for title in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            if title.read_bytes().startswith(b"ray::_Actor"):
                found.append(int(title.parent.name))
    return sorted(found, reverse=True)


def compared(one: Streamed, other: Streamed, data: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Return whether two runs have one plan, and how far apart weights and outputs are."""
    plans = [[(layer.path, layer.format, layer.rank) for layer in own.plan.layers] for own in (one, other)]
    weights = [
        {name: value for file in sorted(own.path.glob("model*.safetensors")) for name, value in load_file(file).items()}
        for own in (one, other)
    ]
    same = weights[0].keys() == weights[1].keys()
    apart = {name: far(value, weights[1][name]) for name, value in weights[0].items()} if same else {}
    with torch.no_grad():
        outputs = [torch.cat([load_pretrained(own.path)(**x).logits.float() for x in data[:8]]) for own in (one, other)]
    return {
        "same_plan": plans[0] == plans[1],
        "largest_difference_of_weights": max(apart.values(), default=None),
        "equal_tensors": sum(value == 0 for value in apart.values()),
        "tensors": len(apart),
        "largest_difference_of_outputs": far(*outputs),
    }


def far(one: Tensor, other: Tensor) -> float:
    """Return the largest difference as a share of the largest number."""
    one, other = one.double(), other.double()
    return float((one - other).abs().max() / one.abs().max())


if __name__ == "__main__":
    main()
