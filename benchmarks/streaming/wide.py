"""Measure data-aware fits of wide layers: time, memory, and how far the error is from the least possible.

    python -m benchmarks.streaming.wide [--config FILE] [--out FILE] [--only CASE]

Each way runs in a process of its own, from the rows of inputs to the factors: ``exact`` sums their second moment in
float64 and takes the eigenvectors of W C Wᵀ (or on the side of the inputs where there are more outputs), ``sketched``
keeps what ``max_width`` 8,192 keeps of it, ``float32`` is given the moment rounded to float32, and ``whitened`` is the
textbook way: eigenvectors of the whole second moment, then an SVD, in float64. Errors are of the outputs on these
rows, as shares of the least at that rank, which ``whitened`` attains.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from tenfold.calibration.moment_sums import MomentSums
from tenfold.decompositions import default_algorithm, fit_layer
from tenfold.profiling import environment
from tenfold.records import LayerSpec

HERE = Path(__file__).parent


def main() -> None:
    """Run every way of every case in a process of its own, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "wide.yaml")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "streaming_wide.json")
    parser.add_argument("--only", help="run this case alone")
    parser.add_argument("--here", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    config = yaml.safe_load(options.config.read_text())
    torch.set_num_threads(config["threads"])
    if options.here:
        print(json.dumps(run(config, *options.here)))
        return
    found: dict[str, Any] = (
        json.loads(options.out.read_text())["cases"] if options.only and options.out.exists() else {}
    )
    words = [sys.executable, "-W", "ignore", "-m", "benchmarks.streaming.wide", "--config", str(options.config)]
    for case in config["cases"] if options.only is None else [options.only]:
        found[case] = {}
        for way in config["ways"]:
            done = subprocess.run([*words, "--here", case, way], check=True, stdout=subprocess.PIPE, text=True)
            found[case][way] = json.loads(done.stdout.splitlines()[-1])
            print(case, way, json.dumps(found[case][way]), flush=True)
        least = min(own["error"] for own in found[case].values())
        for own in found[case].values():
            own["error_over_least"] = own["error"] / least
    result = {"benchmark": "streaming_wide", "config": config, "cases": found}
    result["environment"] = json.loads(environment().to_json())
    options.out.write_text(json.dumps(result, indent=1) + "\n")


def run(config: dict[str, Any], name: str, way: str) -> dict[str, float]:
    """Return what one way takes on one case: processor seconds, MiB above the inputs, and the error."""
    case, drawn = config["cases"][name], torch.Generator().manual_seed(config["seed"])
    outputs, inputs = case["outputs"], case["inputs"]
    weight = torch.randn(outputs, inputs, generator=drawn) / inputs**0.5
    spectrum = torch.arange(1, inputs + 1) ** -0.5  # of real layers: few directions are strong
    rows = torch.randn(4 * config["rows"], inputs, generator=drawn) * spectrum
    rows = rows[:, torch.randperm(inputs, generator=drawn)]
    before, start = _peak(), time.process_time()
    fit = (_whitened if way == "whitened" else _ours)(weight, rows, config["rank"], way)
    seconds, peak = time.process_time() - start, _peak()
    error = sum(float((part @ (weight - fit).T).double().square().sum()) for part in rows.split(1024))
    whole = sum(float((part @ weight.T).double().square().sum()) for part in rows.split(1024))
    return {"processor_seconds": seconds, "mib": peak - before, "error": error / whole}


def _ours(weight: Tensor, rows: Tensor, rank: int, way: str) -> Tensor:
    """Return what the library fits, as a matrix."""
    spec = LayerSpec(kind="linear", in_channels=weight.shape[1], out_channels=weight.shape[0])
    sums = MomentSums(8192 if way == "sketched" else 1 << 20)
    for part in rows.split(1024):
        sums.add(part, spec)
    moments = sums.moments("layer")
    square = moments.input_second_moment
    if way == "float32" and isinstance(square, Tensor):
        moments = moments.replace(input_second_moment=square.float().double())
    algorithm = default_algorithm("low_rank", data_aware=True)
    fit = fit_layer(weight, "low_rank", {"rank": rank}, algorithm, spec=spec, moments=moments.uncentered())
    found: Tensor = fit.value.to_dense()
    return found


def _whitened(weight: Tensor, rows: Tensor, rank: int, _way: str) -> Tensor:
    """Return the best fit by the eigenvectors of the second moment."""
    square = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for part in rows.split(1024):
        square += part.double().T @ part.double()
    values, vectors = torch.linalg.eigh(square)
    root = values.clamp_min(1e-12 * values[-1]).sqrt()
    u, s, v = torch.linalg.svd(weight.double() @ (vectors * root), full_matrices=False)
    found: Tensor = (u[:, :rank] * s[:rank]) @ ((v[:rank] / root) @ vectors.T)
    return found.float()


def _peak() -> float:
    """Return the peak of the resident set so far, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


if __name__ == "__main__":
    main()
