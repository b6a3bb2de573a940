"""Time HOOI: all inner convolutions of ResNet-18 in one call, and one large kernel in turns with TensorLy.

    python -m benchmarks.hooi.run [--config FILE] [--out FOLDER]

Everything is float32 on the CPU. For the large kernel the two run in turns, so that both meet the same noise;
what counts is the median of the ratios of each turn, and whether the error is at most TensorLy's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from tenfold.decompositions import Fit, FitRequest, decompose, decompose_many, default_algorithm
from tenfold.errors import require
from tenfold.profiling import environment
from tenfold.records import LayerSpec
from tenfold.tensors import rel_error

HERE = Path(__file__).parent


def main() -> None:
    """Run both parts of the YAML file; write JSON and a Markdown table; fail where a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "hooi.yaml")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results")
    options = parser.parse_args()
    config = yaml.safe_load(options.config.read_text())
    torch.set_num_threads(config["threads"])
    result: dict[str, Any] = {"benchmark": "hooi", "config": config, "load_before": os.getloadavg()}
    result["network"] = [network(config, kind) for kind in config["network"]["weights"]]
    result["kernel"] = [kernel(config, kind) for kind in config["kernel"]["weights"]]
    result["load_after"] = os.getloadavg()
    result["environment"] = json.loads(environment(torch.device("cpu")).to_json())
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "hooi.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.out / "hooi.md").write_text(table(result))
    print(table(result))
    if not all(row["ok"] for row in (*result["network"], *result["kernel"])):
        raise SystemExit(1)


def network(config: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return seconds and errors of decomposing all the layers of the network at once."""
    wanted, size = config["network"], config["kernel_size"]
    problems = []
    for shape in wanted["shapes"]:
        spec = LayerSpec(kind="conv", in_channels=shape["in"], out_channels=shape["out"], kernel=(size, size))
        rank = {"out": int(wanted["rank"] * shape["out"]), "in": int(wanted["rank"] * shape["in"])}
        for _ in range(shape["count"]):
            weight = make(kind, spec.weight_shape, config["seed"] + len(problems))
            problems.append(FitRequest(weight, spec, "tucker2", rank, default_algorithm("tucker2")))
    fits: list[Fit] = decompose_many(problems)  # warm-up
    seconds = [timed(lambda: decompose_many(problems)) for _ in range(wanted["rounds"])]
    return {
        "weights": kind,
        "layers": len(problems),
        "seconds": [round(s, 4) for s in seconds],
        "median": statistics.median(seconds),
        "rel_errors": [round(fit.rel_error, 6) for fit in fits],
        "sweeps": [fit.n_iter for fit in fits],
        "ok": statistics.median(seconds) < wanted["limit_seconds"],
    }


def kernel(config: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return seconds and errors of HOOI here and in TensorLy, in turns on one kernel."""
    wanted, size = config["kernel"], config["kernel_size"]
    weight = make(kind, (wanted["out"], wanted["in"], size, size), config["seed"])
    rank = wanted["rank"]
    require("tensorly", "dev")
    import tensorly
    from tensorly.decomposition import partial_tucker

    tensorly.set_backend("pytorch")
    found: dict[str, Tensor] = {}

    def ours() -> None:
        found["tenfold"] = decompose(weight, "tucker2", {"out": rank, "in": rank}).value.to_dense()

    def theirs() -> None:
        (core, factors), _ = partial_tucker(weight, rank=[rank, rank], modes=[0, 1])
        found["tensorly"] = tensorly.tenalg.multi_mode_dot(core, factors, modes=[0, 1])

    ours()
    pairs = [(timed(ours), timed(theirs)) for _ in range(wanted["rounds"])]
    errors = {name: rel_error(dense.double(), weight.double()) for name, dense in found.items()}
    ratio = statistics.median(b / a for a, b in pairs)
    return {
        "weights": kind,
        "tensorly_version": tensorly.__version__,
        "seconds": [[round(a, 4), round(b, 4)] for a, b in pairs],
        "tenfold_median": statistics.median(a for a, _ in pairs),
        "tensorly_median": statistics.median(b for _, b in pairs),
        "ratio_median": ratio,
        "ratio_lowest": min(b / a for a, b in pairs),
        "rel_error": errors["tenfold"],
        "tensorly_rel_error": errors["tensorly"],
        "ok": ratio >= wanted["at_least"] and errors["tenfold"] <= errors["tensorly"] * (1 + 1e-4),
    }


def make(kind: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Return a seeded kernel: normal numbers, or such whose channel modes have singular values falling as 1/√i."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    if kind == "falling":
        for mode in (0, 1):
            n = shape[mode]
            frame = torch.linalg.qr(torch.randn(n, n, generator=generator)).Q * torch.arange(1, n + 1).rsqrt()
            weight = torch.tensordot(frame, weight, dims=([1], [mode])).movedim(0, mode)
    return weight.contiguous() / weight.norm()


def timed(run: Callable[[], object]) -> float:
    """Return the seconds that one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def table(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    env, config = result["environment"], result["config"]
    wanted = config["kernel"]
    lines = [
        "# HOOI: time and error",
        "",
        (
            f"`python -m benchmarks.hooi.run` on {env['device_name'] or env['device']}, torch {env['torch']}, "
            f"{config['threads']} threads, float32. Load of the machine {result['load_before'][0]:.1f} before and "
            f"{result['load_after'][0]:.1f} after."
        ),
        "",
        "The sixteen inner 3×3 convolutions of ResNet-18 to Tucker-2 at half rank, in one call:",
        "",
        f"| weights | median of {config['network']['rounds']} | fastest | sweeps | mean rel_error |",
        "| --- | ---: | ---: | --- | ---: |",
    ]
    for row in result["network"]:
        sweeps = f"{min(row['sweeps'])} to {max(row['sweeps'])}"
        mean = statistics.mean(row["rel_errors"])
        lines.append(
            f"| {row['weights']} | {row['median']:.2f} s | {min(row['seconds']):.2f} s | {sweeps} | {mean:.4f} |"
        )
    shape = f"{wanted['out']}×{wanted['in']}×{config['kernel_size']}×{config['kernel_size']}"
    lines += [
        "",
        (
            f"A {shape} kernel to ranks {wanted['rank']}, in turns with TensorLy's `partial_tucker` "
            "(PyTorch backend, its defaults):"
        ),
        "",
        "| weights | tenfold | TensorLy | median ratio | lowest ratio | rel_error | TensorLy's |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['weights']} | {row['tenfold_median']:.3f} s | {row['tensorly_median']:.2f} s | "
        f"{row['ratio_median']:.1f} | {row['ratio_lowest']:.1f} | {row['rel_error']:.5f} | "
        f"{row['tensorly_rel_error']:.5f} |"
        for row in result["kernel"]
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
