"""Time CP by alternating least squares, in turns with TensorLy: at equal sweeps and at equal error.

    python -m benchmarks.cp_als.run [--weights FOLDER] [--config FILE] [--out FOLDER]

Everything is float32 on one thread and starts at random. Seconds are those that the processor spent on the call, which
other processes do not change much; the two run in turns, and what counts is the median of the ratios of each turn.
Trained kernels are skipped without ``--weights``, the folder that holds the checkpoint. Peak memory is that of a
process of its own, beyond what it held before the call.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from benchmarks.hooi.run import make
from tenfold.decompositions import Fit, decompose
from tenfold.decompositions.cp_als import CPALS
from tenfold.errors import require
from tenfold.profiling import environment
from tenfold.tensors import kruskal, rel_error

HERE = Path(__file__).parent


def main() -> None:
    """Run all kernels of the YAML file; write JSON and a Markdown table; fail where a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "cp_als.yaml")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results")
    parser.add_argument("--weights", type=Path, help="folder of the trained checkpoint")
    parser.add_argument("--memory", help=argparse.SUPPRESS)  # one kernel, in a process of its own
    options = parser.parse_args()
    config = yaml.safe_load(options.config.read_text())
    torch.set_num_threads(config["threads"])
    if options.memory:
        print(json.dumps(peak(json.loads(options.memory), config["seed"])))
        return
    result: dict[str, Any] = {"benchmark": "cp_als", "config": config, "load_before": os.getloadavg(), "kernels": []}
    for wanted in config["kernels"]:
        weight = load(wanted, config, options.weights)
        if weight is None:
            print(f"skipped {wanted['name']}: no --weights", file=sys.stderr)
            continue
        row = {"name": wanted["name"], "rank": wanted["rank"], "sweeps": wanted["sweeps"]}
        row |= compare(weight, wanted, config["seed"])
        row["memory"] = memory(wanted, options.config) if wanted["weights"] != "trained" else None
        print(line(row), flush=True)
        result["kernels"].append(row)
        result["load_after"] = os.getloadavg()
        result["environment"] = json.loads(environment(torch.device("cpu")).to_json())
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "cp_als.json").write_text(json.dumps(result, indent=2) + "\n")
        (options.out / "cp_als.md").write_text(table(result))
    large = [row for row in result["kernels"] if row["name"].startswith("512")]
    least, most = config["at_least"], config["memory_below"]
    if not all(
        r["ratio"] >= least["sweeps"] and r["ratio_at_error"] >= least["error"] and r["memory"] <= most for r in large
    ):
        raise SystemExit(1)


def load(wanted: dict[str, Any], config: dict[str, Any], folder: Path | None) -> Tensor | None:
    """Return the kernel: seeded, or of a trained layer; None where that is not there."""
    if wanted["weights"] != "trained":
        return make(wanted["weights"], tuple(wanted["shape"]), config["seed"])
    if folder is None:
        return None
    from safetensors.torch import load_file

    return load_file(folder / config["checkpoint"])[wanted["layer"]].float()


def compare(weight: Tensor, wanted: dict[str, Any], seed: int) -> dict[str, Any]:
    """Return seconds and errors of both, and the sweeps and seconds that TensorLy's error takes here."""
    require("tensorly", "dev")
    import tensorly
    from tensorly.decomposition import parafac

    tensorly.set_backend("pytorch")
    rank, sweeps = wanted["rank"], wanted["sweeps"]
    found: dict[str, Any] = {}

    def ours(n_iter: int = sweeps) -> None:
        found["tenfold"] = fit(weight, rank, n_iter, seed)

    def theirs() -> None:
        found["tensorly"] = parafac(
            weight.flatten(2), rank, n_iter_max=sweeps, init="random", random_state=seed, tol=None
        )

    fit(weight, rank, 2, seed)  # warm-up
    pairs = [(timed(ours), timed(theirs)) for _ in range(wanted["rounds"])]
    factors = list(found["tenfold"].value.tensors().values())
    error = rel_error(found["tenfold"].value.to_dense().double(), weight.double())
    theirs_error = rel_error(tensorly.cp_to_tensor(found["tensorly"]).double(), weight.flatten(2).double())
    enough = first_below(weight, rank, sweeps, theirs_error, seed)
    at_error = [timed(lambda: ours(enough)) for _ in range(wanted["rounds"])]
    return {
        "tensorly_version": tensorly.__version__,
        "seconds": [[round(a, 4), round(b, 4)] for a, b in pairs],
        "tenfold_median": statistics.median(a for a, _ in pairs),
        "tensorly_median": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(b / a for a, b in pairs),
        "rel_error": error,
        "tensorly_rel_error": theirs_error,
        "sensitivity": sensitivity(factors, weight),
        "tensorly_sensitivity": sensitivity([f[None] for f in found["tensorly"].factors], weight),
        "sweeps_to_their_error": enough,
        "seconds_to_their_error": at_error,
        "ratio_at_error": statistics.median(b for _, b in pairs) / statistics.median(at_error),
    }


def fit(weight: Tensor, rank: int, n_iter: int, seed: int) -> Fit:
    """Return the CP of order 3 after at most so many sweeps."""
    return decompose(weight, "cp3", {"rank": rank}, CPALS(n_iter=n_iter, tol=0.0, start="random", seed=seed))


def sensitivity(factors: list[Tensor], weight: Tensor) -> float:
    """Return the least sensitivity of factors over all scalings, as a share of the squared norm of the kernel."""
    return float(kruskal.least_sensitivity([f.double() for f in factors])) / float(weight.double().square().sum())


def first_below(weight: Tensor, rank: int, sweeps: int, error: float, seed: int) -> int:
    """Return the least number of sweeps after which the error is no larger, by bisection; ``sweeps`` if none is."""
    low, high = 0, sweeps
    while high - low > 1:
        middle = (low + high) // 2
        if fit(weight, rank, middle, seed).rel_error <= error:
            high = middle
        else:
            low = middle
    return high


def memory(wanted: dict[str, Any], config: Path) -> float:
    """Return the peak memory of a fit in a process of its own, in sizes of the kernel."""
    command = [sys.executable, "-m", "benchmarks.cp_als.run", "--config", str(config), "--memory", json.dumps(wanted)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=HERE.parent.parent)
    return float(json.loads(done.stdout))


def peak(wanted: dict[str, Any], seed: int) -> float:
    """Return the resident memory that a fit of three sweeps takes, in sizes of the kernel, which counts as one."""
    weight = make(wanted["weights"], tuple(wanted["shape"]), seed)
    fit(make("normal", (16, 16, 3, 3), seed), 8, 2, seed)  # loads what is loaded once
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    fit(weight, wanted["rank"], 3, seed)
    return 1 + (resident("VmHWM") - before) / (weight.numel() * weight.element_size())


def resident(name: str) -> int:
    """Return a figure of this process's memory in bytes."""
    found = next(v for v in Path("/proc/self/status").read_text().splitlines() if v.startswith(name))
    return int(found.split()[1]) * 1024


def timed(run: Callable[[], object]) -> float:
    """Return the processor seconds that one call takes."""
    start = time.process_time()
    run()
    return time.process_time() - start


def line(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    share = "" if row["memory"] is None else f"{row['memory']:.1f}×"
    return (
        f"| {row['name']} | {row['rank']} | {row['tenfold_median']:.2f} s | {row['tensorly_median']:.2f} s | "
        f"{row['ratio']:.1f} | {row['rel_error']:.4f} | {row['tensorly_rel_error']:.4f} | "
        f"{row['sensitivity']:.3g} | {row['tensorly_sensitivity']:.3g} | {row['sweeps_to_their_error']} | "
        f"{row['ratio_at_error']:.1f} | {share} |"
    )


def table(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    env, config = result["environment"], result["config"]
    sweeps = sorted({row["sweeps"] for row in result["kernels"]})
    lines = [
        "# CP by alternating least squares: time and error",
        "",
        (
            f"`python -m benchmarks.cp_als.run --weights FOLDER` on {env['device_name'] or env['device']}, torch "
            f"{env['torch']}, {config['threads']} thread, float32. Load of the machine {result['load_before'][0]:.1f} "
            f"before and {result['load_after'][0]:.1f} after: so the seconds are of processor time, of runs in turns."
        ),
        "",
        (
            f"{' or '.join(map(str, sweeps))} sweeps each, from random starts; TensorLy's `parafac` computes no errors "
            "in between. The sensitivity is the least over all scalings, by the squared norm of the kernel. The last "
            "columns: sweeps of tenfold that reach TensorLy's error, and how many times faster that is; peak memory in "
            "sizes of the kernel, the kernel itself included."
        ),
        "",
        (
            "| kernel | rank | tenfold | TensorLy | ratio | rel_error | TensorLy's | sensitivity | TensorLy's | "
            "sweeps to its error | ratio at equal error | memory |"
        ),
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(line(row) for row in result["kernels"]),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
