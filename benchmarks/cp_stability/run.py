"""Show that CP components diverge under least squares, and what error preserving correction does about it.

    python -m benchmarks.cp_stability.run --weights FOLDER [--config FILE] [--out FOLDER]

FOLDER holds the weights of a trained network in the file that the configuration names. All in float64. Sensitivities
are those after balancing, as shares of ‖W‖²; the closed form is held against Monte Carlo.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from tenfold.decompositions.cp_als import CPSettings, fit_cp
from tenfold.decompositions.cp_epc import CPEPC
from tenfold.decompositions.gauss_newton import descend
from tenfold.profiling import environment
from tenfold.tensors import kruskal

HERE = Path(__file__).parent
F64 = torch.float64


def main() -> None:
    """Run all tensors of the YAML file; write JSON and a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=HERE / "cp_stability.yaml")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results")
    options = parser.parse_args()
    config = yaml.safe_load(options.config.read_text())
    torch.set_num_threads(config["threads"])
    rows = []
    state = load_file(options.weights / config["kernels"]["file"])
    for name in config["kernels"]["layers"]:
        tensor = state[name].to(F64).flatten(2)[None]
        shape = tensor.shape[1:]
        rank = max(int(shape.numel() / config["kernels"]["fewer"] / sum(shape)), 1)
        rows.append(stabilised(name.removesuffix(".weight"), tensor, rank, config))
    for case in config["synthetic"]:
        tensor = synthetic(case, config["seed"])
        rows.append(stabilised(case["name"], tensor, case["rank"], config))
    result: dict[str, Any] = {"benchmark": "cp_stability", "config": config, "rows": rows}
    result["exact"] = [finished(c, config) for c in config["exact"]["cosines"]]
    result["environment"] = json.loads(environment(torch.device("cpu")).to_json())
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "cp_stability.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.out / "cp_stability.md").write_text(table(result))
    print(table(result))


def stabilised(name: str, tensor: Tensor, rank: int, config: dict[str, Any]) -> dict[str, Any]:
    """Return errors, norms and sensitivities on the way of least squares, and after correction."""
    ways = []
    for wanted in config["ways"]:
        how = {"n_iter": wanted["sweeps"], "momentum": wanted["momentum"]}
        settings = CPSettings(tol=0.0, start="random", compress=False, seed=config["seed"], **how)
        begun = time.perf_counter()
        plain = list(fit_cp(tensor, rank, settings).factors)
        row = {"way": wanted["name"], "als_seconds": time.perf_counter() - begun, "als": seen(tensor, plain, config)}
        for objective in ("sensitivity", "norms"):
            begun = time.perf_counter()
            epc = CPEPC(
                slack=1.0, bound=config["more"] * row["als"]["rel_error"], objective=objective, **config["correction"]
            )
            found = epc.stabilise(tensor, plain)
            row[objective] = {
                **seen(tensor, found.factors, config),
                "sweeps": found.n_iter,
                "seconds": time.perf_counter() - begun,
            }
            row[objective]["error_times"] = row[objective]["rel_error"] / row["als"]["rel_error"]
            row[objective]["times_lower"] = row["als"]["sensitivity"] / row[objective]["sensitivity"]
        ways.append(row)
        print(name, rank, json.dumps(row))
    return {"name": name, "shape": list(tensor.shape[1:]), "rank": rank, "ways": ways}


def seen(tensor: Tensor, factors: list[Tensor], config: dict[str, Any]) -> dict[str, float]:
    """Return relative error, sensitivity, norms and condition of a fit, and Monte Carlo's part of the closed form."""
    factors, total = kruskal.balance(factors), tensor.square().sum()
    closed = kruskal.sensitivity(factors)
    generator, step, summed = torch.Generator().manual_seed(config["seed"]), 1e-5, torch.zeros((), dtype=F64)
    there = kruskal.to_tensor(factors)
    scale = closed.sqrt() / total.sqrt()
    noise = float(step / scale)
    for _ in range(config["draws"]):
        moved = [f + noise * torch.randn(f.shape, generator=generator, dtype=F64) for f in factors]
        summed += (kruskal.to_tensor(moved) - there).square().sum() / noise**2
    return {
        "rel_error": float((tensor - there).norm() / total.sqrt()),
        "sensitivity": float(closed / total),
        "monte_carlo": float(summed / config["draws"] / closed),
        "largest_component": float(kruskal.component_norms(factors).max() / total.sqrt()),
        "cancellation": float(kruskal.cancellation(factors)),
        "condition": float(kruskal.condition(factors)),
    }


def collinear(shape: list[int], count: int, cosine: float, seed: int) -> Tensor:
    """Return a tensor of ``count`` components any two of which have this cosine in every mode."""
    generator, factors = torch.Generator().manual_seed(seed), []
    for n in shape:
        frame = torch.randn(n, count, generator=generator, dtype=F64)
        lower = torch.linalg.cholesky(cosine + (1 - cosine) * torch.eye(count, dtype=F64))
        mixed = torch.linalg.qr(frame).Q @ lower.T if n >= count else frame @ lower.T
        factors.append((mixed / mixed.norm(dim=0))[None])
    return kruskal.to_tensor(factors)


def synthetic(case: dict[str, Any], seed: int) -> Tensor:
    """Return a tensor that has no best approximation of its rank, or a bad one."""
    shape, generator = case["shape"], torch.Generator().manual_seed(seed + 1)
    if case["kind"] == "border":
        frames = [torch.linalg.qr(torch.randn(n, 2, generator=generator, dtype=F64)).Q for n in shape]
        (a, p), (b, q), (c, s) = (f.unbind(1) for f in frames)
        terms = ((a, b, s), (a, q, c), (p, b, c))
        return torch.stack([torch.einsum("i,j,k->ijk", *t) for t in terms]).sum(0)[None]
    noise = torch.randn(1, *shape, generator=generator, dtype=F64)
    if case["kind"] == "noise":
        return noise
    clean = collinear(shape, case["components"], case["cosine"], seed)
    return clean + case["noise"] * noise * clean.norm() / noise.norm()


def finished(cosine: float, config: dict[str, Any]) -> dict[str, Any]:
    """Return errors and seconds of alternating least squares and of damped Gauss-Newton where an exact fit exists."""
    wanted = config["exact"]
    tensor = collinear(wanted["shape"], wanted["components"], cosine, config["seed"])
    settings = CPSettings(n_iter=10, tol=0.0, start="random", seed=config["seed"])
    start = fit_cp(tensor, wanted["components"], settings)
    row: dict[str, Any] = {"cosine": cosine}
    for sweeps in (200, 2000):
        begun = time.perf_counter()
        longer = CPSettings(n_iter=sweeps, tol=0.0, start="random", seed=config["seed"])
        found = fit_cp(tensor, wanted["components"], longer)
        error = float((tensor - kruskal.to_tensor(found.factors)).norm() / tensor.norm())
        row[f"als_{sweeps}"] = {"rel_error": error, "seconds": time.perf_counter() - begun}
    begun = time.perf_counter()
    steps = descend(tensor, start.factors, n_iter=200, tol=1e-12)
    row["gauss_newton"] = {
        "rel_error": float(steps.squares.sqrt() / tensor.norm()),
        "steps": steps.n_iter,
        "seconds": time.perf_counter() - begun,
    }
    return row


def table(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    env, config = result["environment"], result["config"]
    lines = [
        "# Stability of CP",
        "",
        (
            f"`python -m benchmarks.cp_stability.run --weights FOLDER` on {env['device_name'] or env['device']}, torch "
            f"{env['torch']}, {config['threads']} thread, float64, CP of order 3 from one random start. Sensitivity is "
            "that after balancing, over ‖W‖²; the largest component and √Σλ² are over ‖W‖. Corrections end at "
            f"{config['more']} times the error of least squares, {config['ways'][0]['sweeps']} sweeps."
        ),
        "",
        (
            "| tensor | rank | least squares | error | sensitivity | largest component | √Σλ² | "
            "error × | sensitivity ÷ | largest component | √Σλ² | sensitivity ÷ (norms) |"
        ),
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        shape = "×".join(map(str, row["shape"]))
        for way in row["ways"]:
            als, epc, norms = way["als"], way["sensitivity"], way["norms"]
            lines.append(
                f"| {row['name']} {shape} | {row['rank']} | {way['way']} | {als['rel_error']:.4f} | "
                f"{als['sensitivity']:.3g} | {als['largest_component']:.2f} | {als['cancellation']:.2f} | "
                f"{epc['error_times']:.4f} | {epc['times_lower']:.1f} | {epc['largest_component']:.2f} | "
                f"{epc['cancellation']:.2f} | {norms['times_lower']:.1f} |"
            )
    kinds = ("als", "sensitivity", "norms")
    ratios = [way[kind]["monte_carlo"] for row in result["rows"] for way in row["ways"] for kind in kinds]
    lines += [
        "",
        (
            f"Monte Carlo with {config['draws']} draws is {min(ratios):.4f} to {max(ratios):.4f} times the closed form "
            "of the sensitivity, over all fits."
        ),
        "",
        "Tensors that have an exact decomposition with collinear components, least squares and damped Gauss-Newton:",
        "",
        "| cosine | ALS, 200 sweeps | ALS, 2000 sweeps | Gauss-Newton | its steps |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in result["exact"]:
        few, many, newton = row["als_200"], row["als_2000"], row["gauss_newton"]
        parts = (f"{r['rel_error']:.1e} in {r['seconds']:.1f} s" for r in (few, many, newton))
        lines.append(f"| {row['cosine']} | {' | '.join(parts)} | {newton['steps']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
