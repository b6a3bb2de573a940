"""Compare pairs of factors with pairs that have an identity block and as many parameters: by the clock, by error.

    python -m benchmarks.interpolative.run [--weights FILE] [--config FILE] [--out FILE]

Single layers are timed on one thread, in turns. Of the matrices in a file of weights, such as a language model's, it
tells what both lose of them at equal sizes. Writes JSON, and Markdown beside it.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import safe_open
from torch import Tensor, nn

from tenfold.exporting import EXPORTERS
from tenfold.formats import FORMATS
from tenfold.layers import FactorizedLayer, build
from tenfold.profiling import compare_latency, environment
from tenfold.records import LayerSpec, Speedup
from tenfold.runtimes.program import program_of
from tenfold.tensors import singular_values
from tenfold.testing.weights import random_bias, random_factors

HERE = Path(__file__).parent
PAIRS = ("low_rank", "interpolative")


def main() -> None:
    """Time all layers and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "interpolative.yaml")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "interpolative.json")
    parser.add_argument("--weights", type=Path, help="safetensors whose matrices are to be approximated")
    options = parser.parse_args()
    config = yaml.safe_load(options.config.read_text())
    torch.set_num_threads(1)
    rows = []
    for layer in config["layers"]:
        for keep in config["keep"]:
            rows += [timed(layer, keep, runtime, config) for runtime in config["runtimes"]]
            print(rows[-1], flush=True)
    errors = {} if options.weights is None else lost(options.weights, config)
    result = {"benchmark": "interpolative", "config": config, "rows": rows, "errors": errors}
    options.out.write_text(json.dumps(result | {"environment": json.loads(environment().to_json())}, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(page(rows, errors))


def timed(layer: dict[str, int], keep: float, runtime: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return the ranks of both pairs at this share of the parameters, and their speed-ups over the dense layer."""
    spec, x = geometry(layer)
    ranks = {name: rank_at(name, spec, keep) for name in PAIRS}
    models: dict[str, nn.Module] = {"dense": dense(spec)}
    models |= {name: factorized(name, spec, rank) for name, rank in ranks.items()}
    with tempfile.TemporaryDirectory() as folder:
        ready = {name: opened(model, x, runtime, Path(folder) / name) for name, model in models.items()}
        found = compare_latency(
            {name: (model, x) for name, model in ready.items()}, seconds=config["seconds"], threads=1
        )
    speed = {name: shown(found.speedups[name]) for name in PAIRS}
    return {**layer, "keep": keep, "runtime": runtime, "ranks": ranks, "dense_ms": found.latencies["dense"].median_ms,
            **speed}  # fmt: skip


def geometry(layer: dict[str, int]) -> tuple[LayerSpec, Tensor]:
    """Return the dense layer and its inputs."""
    channels: dict[str, Any] = {"in_channels": layer["in"], "out_channels": layer["out"], "bias": True}
    if "rows" in layer:
        return LayerSpec(kind="linear", **channels), torch.randn(1, layer["rows"], layer["in"])
    side = layer["side"]
    return LayerSpec(kind="conv", kernel=(1, 1), **channels), torch.randn(layer["batch"], layer["in"], side, side)


def rank_at(format: str, spec: LayerSpec, keep: float) -> int:
    """Return the largest multiple of 8, as planners take, with at most this share of the layer's parameters."""
    kind = FORMATS.get(format)
    ranks = np.arange(1, kind.max_rank(spec)["rank"] + 1)[:, None]
    return int((kind.params_at(spec, ranks) <= keep * spec.num_params).sum()) // 8 * 8


def dense(spec: LayerSpec) -> nn.Module:
    """Return the layer as it is."""
    return build(
        spec, nn.Parameter(torch.randn(spec.weight_shape)), nn.Parameter(torch.zeros(spec.out_channels))
    ).eval()


def factorized(format: str, spec: LayerSpec, rank: int) -> nn.Module:
    """Return it with made-up factors."""
    value = random_factors(FORMATS.get(format), spec, {"rank": rank}).to(torch.float32)
    return FactorizedLayer.of(value, random_bias(spec, torch.float32)).eval()


def opened(model: nn.Module, x: Tensor, runtime: str, file: Path) -> nn.Module:
    """Return the layer as this runtime has it."""
    if runtime == "torch":
        return model
    exporter = EXPORTERS.get("onnx")()
    exporter.write(program_of(model, (x,), dynamic_batch=False), file, opset=None)
    module: nn.Module = exporter.open(file)
    return module


def lost(file: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return the mean of ‖W − Ŵ‖²/‖W‖² over the matrices that the configuration names, by share and format."""
    found: dict[float, list[list[float]]] = {keep: [] for keep in config["errors_at"]}
    with safe_open(file, "pt") as weights:
        for name in (name for name in weights.keys() if re.search(config["matrices"], name)):  # noqa: SIM118
            matrix = weights.get_tensor(name).float()
            spec = LayerSpec(kind="linear", out_channels=matrix.shape[0], in_channels=matrix.shape[1])
            values = singular_values(matrix).double().square()
            left = 1 - values.cumsum(0) / values.sum()
            for keep, own in found.items():
                own.append([float(left[rank_at(pair, spec, keep) - 1]) for pair in PAIRS])
    means = {keep: dict(zip(PAIRS, np.mean(own, axis=0).round(4).tolist(), strict=True)) for keep, own in found.items()}
    return {"file": file.name, "matrices": len(next(iter(found.values()))), "means": means}


def shown(speedup: Speedup) -> dict[str, Any]:
    """Return the factor, its interval, and whether it is in doubt."""
    return {"ratio": round(speedup.ratio, 3), "low": round(speedup.low, 3), "high": round(speedup.high, 3),
            "doubt": speedup.doubt}  # fmt: skip


def page(rows: list[dict[str, Any]], errors: dict[str, Any]) -> str:
    """Return the tables."""
    lines = [
        "# Pairs with an identity block",
        "",
        "## By the clock",
        "",
        "`python -m benchmarks.interpolative.run`; one thread, float32. Speed-ups over the dense layer in the same",
        "runtime, in turns, with 95 % intervals: above 1 is faster. Both pairs have at most the parameters in *kept*.",
        "",
        "| layer | input | kept | runtime | rank, pair | rank, interpolative | dense ms | pair | interpolative |",
        "|---|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        at = f"{row['rows']} rows" if "rows" in row else f"{row['batch']} × {row['side']}²"
        cells = [f"{row['in']} → {row['out']}", at, f"{row['keep']:.0%}", row["runtime"]]
        cells += [str(row["ranks"][name]) for name in PAIRS] + [f"{row['dense_ms']:.3f}"]
        cells += [f"{row[n]['ratio']:.2f} [{row[n]['low']:.2f}–{row[n]['high']:.2f}]" for n in PAIRS]
        lines.append(f"| {' | '.join(cells)} |")
    if errors:
        about = f"Mean of ‖W − Ŵ‖²/‖W‖² over {errors['matrices']} matrices of `{errors['file']}`."
        lines += ["", "## By error", "", about, "", "| kept | pair | interpolative |", "|---:|---:|---:|"]
        lines += [
            f"| {keep:.0%} | {own[PAIRS[0]]:.1%} | {own[PAIRS[1]]:.1%} |" for keep, own in errors["means"].items()
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
