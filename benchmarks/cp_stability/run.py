"""Show that CP components diverge under plain least squares, and what error preserving correction does about it.

    python -m benchmarks.cp_stability.run --weights FOLDER [--config FILE] [--out FOLDER]

FOLDER holds the weights of a trained network in the file that the configuration names. Plain least squares are those of
TensorLy, from random factors. All in float64. Sensitivities are shares of ‖W‖²: of the factors as they come, and after
balancing, which moves scales within a component and changes nothing else. The closed form is held against Monte Carlo.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tensorly
import torch
import yaml
from safetensors.torch import load_file
from tensorly.decomposition import parafac
from torch import Tensor

from tenfold.decompositions.cp.als import CPALS, fit_cp
from tenfold.decompositions.cp.epc import CPEPC
from tenfold.decompositions.cp.gauss_newton import descend
from tenfold.profiling import environment
from tenfold.tensors import kruskal

HERE = Path(__file__).parent
F64 = torch.float64
Config = dict[str, Any]
Row = dict[str, Any]


def main() -> None:
    """Run all tensors of the YAML file; write JSON and Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=HERE / "cp_stability.yaml")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results")
    options = parser.parse_args()
    config = yaml.safe_load(options.config.read_text())
    torch.set_num_threads(config["threads"])
    tensorly.set_backend("pytorch")
    state = load_file(options.weights / config["kernels"]["file"])
    rows = []
    for name, tensor, rank in cases(config, state):
        rows.append(stabilised(name, tensor, rank, config))
        print(json.dumps(rows[-1]), flush=True)
    finished = []
    for name, tensor, rank in hard(config, state):
        finished.append(accurate(name, tensor, rank, config["finisher"], config["seed"]))
        print(json.dumps(finished[-1]), flush=True)
    result: Row = {"benchmark": "cp_stability", "config": config, "rows": rows, "finisher": finished}
    result["environment"] = json.loads(environment(torch.device("cpu")).to_json())
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "cp_stability.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.out / "cp_stability.md").write_text(table(result))
    print(table(result))


def kernel(state: dict[str, Tensor], name: str) -> Tensor:
    """Return the kernel of a layer as a tensor (1, out, in, taps)."""
    return state[f"{name}.weight"].to(F64).flatten(2)[None]


def cases(config: Config, state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, int]]:
    """Yield name, tensor and rank of everything that is to be stabilised."""
    for layer in config["kernels"]["layers"]:
        for rank in layer["ranks"]:
            yield layer["name"], kernel(state, layer["name"]), rank
    for case in config["synthetic"]:
        yield case["name"], synthetic(case, config["seed"]), case["rank"]


def hard(config: Config, state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, int]]:
    """Yield name, tensor and rank of what the finisher is tried on."""
    wanted = config["finisher"]["collinear"]
    for cosine in wanted["cosines"]:
        tensor = collinear(wanted["shape"], wanted["components"], cosine, config["seed"])
        yield f"exact, cosine {cosine}", tensor, wanted["components"]
    for case in config["finisher"]["kernels"]:
        yield case["name"], kernel(state, case["name"]), case["rank"]


def stabilised(name: str, tensor: Tensor, rank: int, config: Config) -> Row:
    """Return errors, norms and sensitivities of plain least squares and after correction, there and from scratch."""
    row: Row = {"name": name, "shape": list(tensor.shape[1:]), "rank": rank}
    plain, seconds = timed(lambda: plain_als(tensor, rank, config))
    row["plain"] = {**seen(tensor, plain, config), "seconds": seconds}
    own, seconds = timed(lambda: fit_cp(tensor, rank, CPALS(seed=config["seed"])))
    row["cp_als"] = {**seen(tensor, own.factors, config), "seconds": seconds, "sweeps": own.n_iter}
    epc = CPEPC(slack=1.0, bound=min(config["more"] * row["plain"]["rel_error"], 0.999), seed=config["seed"])
    ways = {"corrected": lambda: epc.stabilise(tensor, plain), "cp_epc": lambda: epc.fit_terms(tensor, rank)}
    for way, run in ways.items():
        found, seconds = timed(run)
        row[way] = {**seen(tensor, found.factors, config), "seconds": seconds, "sweeps": found.n_iter}
        row[way]["error_times"] = row[way]["rel_error"] / row["plain"]["rel_error"]
        row[way]["raw_lower"] = row["plain"]["raw_sensitivity"] / row[way]["raw_sensitivity"]
        row[way]["lower"] = row["plain"]["sensitivity"] / row[way]["sensitivity"]
    return row


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """Return the result and the seconds it took."""
    begun = time.perf_counter()
    found = run()
    return found, time.perf_counter() - begun


def plain_als(tensor: Tensor, rank: int, config: Config) -> list[Tensor]:
    """Return the factors of TensorLy's alternating least squares as they come."""
    weights, factors = parafac(
        tensor[0],
        rank,
        n_iter_max=config["plain"]["sweeps"],
        tol=config["plain"]["tol"],
        init="random",
        random_state=config["seed"],
    )
    first, *others = factors
    return [(first * weights)[None], *(f[None] for f in others)]


def seen(tensor: Tensor, factors: list[Tensor], config: Config) -> dict[str, float]:
    """Return relative error, sensitivities, norms and condition, and Monte Carlo's part of the closed form."""
    total, raw = tensor.square().sum(), kruskal.sensitivity(factors)
    factors = kruskal.balance(factors)
    closed = kruskal.sensitivity(factors)
    generator, step, summed = torch.Generator().manual_seed(config["seed"]), 1e-5, torch.zeros((), dtype=F64)
    there = kruskal.to_tensor(factors)
    noise = float(step * (total / closed).sqrt())
    for _ in range(config["draws"]):
        moved = [f + noise * torch.randn(f.shape, generator=generator, dtype=F64) for f in factors]
        summed += (kruskal.to_tensor(moved) - there).square().sum() / noise**2
    return {
        "rel_error": float((tensor - there).norm() / total.sqrt()),
        "raw_sensitivity": float(raw / total),
        "sensitivity": float(closed / total),
        "monte_carlo": float(summed / config["draws"] / closed),
        "largest_component": float(kruskal.component_norms(factors).max() / total.sqrt()),
        "cancellation": float(kruskal.cancellation(factors)),
        "condition": float(kruskal.condition(factors)),
    }


def collinear(shape: list[int], count: int, cosine: float, seed: int) -> Tensor:
    """Return a tensor of ``count`` components any two of which have this cosine in every mode that has the room."""
    generator, factors = torch.Generator().manual_seed(seed), []
    for n in shape:
        frame = torch.randn(n, count, generator=generator, dtype=F64)
        lower = torch.linalg.cholesky(cosine + (1 - cosine) * torch.eye(count, dtype=F64))
        mixed = torch.linalg.qr(frame).Q @ lower.T if n >= count else frame @ lower.T
        factors.append((mixed / mixed.norm(dim=0))[None])
    return kruskal.to_tensor(factors)


def border(shape: list[int], rank: int, generator: torch.Generator) -> Tensor:
    """Return a sum of ``rank``/2 terms a∘b∘s + a∘q∘c + p∘b∘c: of rank 3 each, but the limit of tensors of rank 2."""
    frames = [torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=F64)).Q for n in shape]
    parts = []
    for i in range(0, rank, 2):
        (a, p), (b, q), (c, s) = (f[:, i : i + 2].unbind(1) for f in frames)
        parts += [torch.einsum("i,j,k->ijk", *t) for t in ((a, b, s), (a, q, c), (p, b, c))]
    return torch.stack(parts).sum(0)[None]


def synthetic(case: Config, seed: int) -> Tensor:
    """Return a tensor that has no best approximation of its rank, or a bad one."""
    shape, generator = case["shape"], torch.Generator().manual_seed(seed + 1)
    noise = torch.randn(1, *shape, generator=generator, dtype=F64)
    if case["kind"] == "noise":
        return noise
    if case["kind"] == "border":
        clean = border(shape, case["rank"], generator)
    else:
        clean = collinear(shape, case["components"], case["cosine"], seed)
    return clean + case["noise"] * noise * clean.norm() / noise.norm()


def accurate(name: str, tensor: Tensor, rank: int, wanted: Config, seed: int) -> Row:
    """Return errors and seconds of more alternating least squares, and of damped Gauss-Newton after a few."""
    row: Row = {"name": name, "shape": list(tensor.shape[1:]), "rank": rank, "als": []}
    few, many = (CPALS(n_iter=n, tol=0.0, start="random", seed=seed) for n in wanted["sweeps"])
    for settings in (few, many):
        found, seconds = timed(lambda settings=settings: fit_cp(tensor, rank, settings))
        row["als"].append({"sweeps": found.n_iter, "rel_error": error(tensor, found.factors), "seconds": seconds})
    start, first = timed(lambda: fit_cp(tensor, rank, CPALS(start="random", seed=seed)))
    steps, seconds = timed(lambda: descend(tensor, start.factors, n_iter=wanted["steps"], tol=1e-12))
    row["gauss_newton"] = {
        "steps": steps.n_iter,
        "rel_error": error(tensor, steps.factors),
        "seconds": first + seconds,
    }
    return row


def error(tensor: Tensor, factors: list[Tensor]) -> float:
    """Return ‖T − T̂‖/‖T‖."""
    return float((tensor - kruskal.to_tensor(factors)).norm() / tensor.norm())


def table(result: Row) -> str:
    """Return the result as Markdown."""
    env, config = result["environment"], result["config"]
    lines = [
        "# Stability of CP",
        "",
        (
            f"`python -m benchmarks.cp_stability.run --weights FOLDER` on {env['device_name'] or env['device']}, torch "
            f"{env['torch']}, {config['threads']} thread, float64, CP of order 3. *Plain*: TensorLy's `parafac`, "
            f"{config['plain']['sweeps']} sweeps from one random start. *Corrected*: error preserving correction from "
            f"there, to at most {config['more']} times its error. *cp_epc*: from scratch, that error as the bound. "
            "Sensitivities are over ‖W‖², as the factors come (raw) and after balancing; ÷ says how many times lower "
            "than plain, raw and balanced. Components are over ‖W‖: the largest, and √Σλ²."
        ),
        "",
        (
            "| tensor | rank | plain: error | raw sensitivity | balanced | largest | √Σλ² | corrected: error × | ÷ raw "
            "| ÷ balanced | largest | √Σλ² | cp_epc: error × | ÷ raw | ÷ balanced |"
        ),
        "| --- | ---: " + "| ---: " * 13 + "|",
    ]
    for row in result["rows"]:
        plain, fixed, own = row["plain"], row["corrected"], row["cp_epc"]
        parts = [f"{row['name']} {'×'.join(map(str, row['shape']))}", f"{row['rank']}", f"{plain['rel_error']:.4f}"]
        parts += [f"{plain[k]:.3g}" for k in ("raw_sensitivity", "sensitivity")]
        parts += [f"{plain[k]:.2f}" for k in ("largest_component", "cancellation")]
        parts += [f"{fixed['error_times']:.3f}", f"{fixed['raw_lower']:.3g}", f"{fixed['lower']:.3g}"]
        parts += [f"{fixed[k]:.2f}" for k in ("largest_component", "cancellation")]
        parts += [f"{own['error_times']:.3f}", f"{own['raw_lower']:.3g}", f"{own['lower']:.3g}"]
        lines.append(f"| {' | '.join(parts)} |")
    kinds = ("plain", "cp_als", "corrected", "cp_epc")
    ratios = [row[kind]["monte_carlo"] for row in result["rows"] for kind in kinds]
    lines += [
        "",
        (
            f"Monte Carlo with {config['draws']} draws is {min(ratios):.4f} to {max(ratios):.4f} times the closed form "
            "of the sensitivity, over all fits."
        ),
        "",
        "tenfold's own `cp_als` at its defaults (balanced, a small ridge, stopped when the error hardly falls):",
        "",
        "| tensor | rank | error | sensitivity | largest | √Σλ² | seconds, plain | cp_als | corrected | cp_epc |",
        "| --- | ---: " + "| ---: " * 8 + "|",
    ]
    for row in result["rows"]:
        als = row["cp_als"]
        parts = [f"{row['name']} {'×'.join(map(str, row['shape']))}", f"{row['rank']}", f"{als['rel_error']:.4f}"]
        parts += [f"{als['sensitivity']:.3g}", f"{als['largest_component']:.2f}", f"{als['cancellation']:.2f}"]
        parts += [f"{row[kind]['seconds']:.1f}" for kind in kinds]
        lines.append(f"| {' | '.join(parts)} |")
    few, many = config["finisher"]["sweeps"]
    lines += [
        "",
        "The finisher: extrapolated alternating least squares, and damped Gauss-Newton from where `cp_als` ends.",
        "",
        f"| tensor | rank | ALS, {few} sweeps | ALS, {many} sweeps | Gauss-Newton | its steps |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in result["finisher"]:
        tries = (*row["als"], row["gauss_newton"])
        cells = " | ".join(f"{r['rel_error']:.3g} in {r['seconds']:.1f} s" for r in tries)
        lines.append(f"| {row['name']} | {row['rank']} | {cells} | {row['gauss_newton']['steps']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
