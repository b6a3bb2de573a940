"""Time EVBMF ranks and Tucker-2 factors of ResNet-18's inner convolutions against the same through full SVDs.

    python -m benchmarks.evbmf.run [--config FILE] [--out FOLDER] [--threads N]

Four ways, in turns: tenfold (spectra and subspaces from Gram matrices), and reference code that takes every spectrum
and every subspace from an SVD, once with all singular vectors, as numpy's default and MUSCO have it, and once without
those beyond the rank; and TensorLy's Tucker, as MUSCO calls it. All use the same EVBMF solution and weakening, the
first three the same start and stop rule as well, so that they must agree.
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
from torch import Tensor, nn

from tenfold.decompositions import FitRequest, decompose_many, default_algorithm
from tenfold.formats import Rank
from tenfold.planning import plan
from tenfold.profiling import environment, profile
from tenfold.records import Recipe
from tenfold.tensors import unfold
from tenfold.tensors.vbmf import evbmf

HERE = Path(__file__).parent
SIDES = {64: 56, 128: 28, 256: 14, 512: 7}
WAYS = ("tenfold", "thin_svd", "full_svd", "tensorly")
Outcome = list[tuple[Rank, float]]

HEAD = """\
# EVBMF ranks and Tucker-2 of ResNet-18's sixteen inner 3x3 convolutions

`python -m benchmarks.evbmf.run` on {device}, torch {torch}, Python {python}, {threads} threads. Random weights with a
decaying spectrum; `weaken` {weaken}; {rounds} rounds in turns; load of the machine (1 min) between {low:.1f} and
{high:.1f}, this benchmark included.

| way | EVBMF s | Tucker-2 s | total s (median) | fastest s | CPU s | slower than tenfold | more CPU |
|---|---:|---:|---:|---:|---:|---:|---:|
"""
FOOT = """
*thin_svd* and *full_svd* run tenfold's own sweeps; *full_svd* takes all singular vectors of every matrix, as numpy does
by default, *thin_svd* only those that can carry something. *tensorly* takes the spectra as *full_svd* does and the
factors from `tensorly.decomposition.partial_tucker` with its own stop rule, as MUSCO does. *Slower* and *more CPU*:
ratios of the medians; on a busy machine only the processor time on one thread means something. Largest difference
between the ways: rank {ranks}, relative error {errors:.1e}.
"""


def main() -> None:
    """Run all ways in turns and write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "resnet18.yaml")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    config = yaml.safe_load(options.config.read_text())
    torch.set_num_threads(options.threads)
    result = measure(config)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "evbmf.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.out / "evbmf.md").write_text(table(result))
    print(table(result))


def measure(config: dict[str, Any]) -> dict[str, Any]:
    """Return the times of all ways, round by round, and how far their outcomes differ."""
    kernels = weights(config)
    ways: dict[str, Callable[[], tuple[float, float, Outcome]]] = {
        "tenfold": lambda: by_gram(kernels, config["weaken"]),
        "thin_svd": lambda: by_svd(kernels, config["weaken"], full=False),
        "full_svd": lambda: by_svd(kernels, config["weaken"], full=True),
        "tensorly": lambda: by_tensorly(kernels, config["weaken"]),
    }
    by_gram(kernels[:5], config["weaken"])  # libraries load and threads start before the clock
    by_svd(kernels[:1], config["weaken"], full=True)
    by_tensorly(kernels[:1], config["weaken"])
    rows: list[dict[str, Any]] = []
    outcomes: dict[str, Outcome] = {}
    for turn in range(config["rounds"]):
        for way in WAYS:
            busy = time.process_time()
            ranks_s, factors_s, outcomes[way] = ways[way]()
            seconds = {"ranks_s": ranks_s, "factors_s": factors_s, "cpu_s": time.process_time() - busy}
            rows.append({"round": turn, "way": way, **seconds, "load": os.getloadavg()[0]})
            print(rows[-1], flush=True)
    totals = {w: [r["ranks_s"] + r["factors_s"] for r in rows if r["way"] == w] for w in WAYS}
    medians = {w: statistics.median(t) for w, t in totals.items()}
    cpu = {w: statistics.median(r["cpu_s"] for r in rows if r["way"] == w) for w in WAYS}
    return {
        "benchmark": "evbmf",
        "config": config,
        "median_s": medians,
        "fastest_s": {w: min(t) for w, t in totals.items()},
        "median_cpu_s": cpu,
        "slower_than_tenfold": {w: medians[w] / medians["tenfold"] for w in WAYS},
        "more_cpu_than_tenfold": {w: cpu[w] / cpu["tenfold"] for w in WAYS},
        "largest_rank_difference": max(_rank_gap(outcomes["tenfold"], outcomes[w]) for w in WAYS),
        "largest_error_difference": max(_error_gap(outcomes["tenfold"], outcomes[w]) for w in WAYS),
        "outcome": [{"rank": rank, "rel_error": error} for rank, error in outcomes["tenfold"]],
        "rounds": rows,
        "environment": json.loads(environment(torch.device("cpu")).to_json()),
    }


def weights(config: dict[str, Any]) -> list[Tensor]:
    """Return kernels (out, in, 3, 3): components of decaying weight in both channel modes, and noise."""
    generator = torch.Generator().manual_seed(config["seed"])
    kernels = []
    for out, inner in config["layers"]:
        core = torch.randn(out, inner, 9, generator=generator)
        core *= (torch.arange(1, out + 1) ** -config["decay"])[:, None, None]
        core *= (torch.arange(1, inner + 1) ** -config["decay"])[:, None]
        left = torch.linalg.qr(torch.randn(out, out, generator=generator)).Q
        right = torch.linalg.qr(torch.randn(inner, inner, generator=generator)).Q
        signal = torch.einsum("abk,oa,ib->oik", core, left, right)
        kernel = signal / signal.std() + config["noise"] * torch.randn(out, inner, 9, generator=generator)
        kernels.append((kernel / kernel.std() * (2 / (9 * inner)) ** 0.5).reshape(out, inner, 3, 3))
    return kernels


def by_gram(kernels: list[Tensor], weaken: float) -> tuple[float, float, Outcome]:
    """Return the seconds for ranks and for factors, and both, as the package does it."""
    model = Kernels(kernels)
    cost = profile(model, [torch.zeros(1, k.shape[1], SIDES[k.shape[0]], SIDES[k.shape[0]]) for k in kernels])
    recipe = Recipe(rule={"name": "evbmf", "weaken": weaken}, formats="tucker2", keep_ends=False)
    start = time.perf_counter()
    made = plan(model, cost, recipe)
    middle = time.perf_counter()
    ranks = [layer.rank or {} for layer in made.layers]
    algorithm = default_algorithm("tucker2")
    specs = [layer.spec for layer in cost.layers if layer.spec is not None]
    parts = zip(kernels, specs, ranks, strict=True)
    fits = decompose_many([FitRequest(kernel, spec, "tucker2", rank, algorithm) for kernel, spec, rank in parts])
    end = time.perf_counter()
    return middle - start, end - middle, [(rank, fit.rel_error) for rank, fit in zip(ranks, fits, strict=True)]


class Kernels(nn.Module):
    """Convolutions side by side, each with an input of its own."""

    def __init__(self, kernels: list[Tensor]) -> None:
        super().__init__()
        convs = [nn.Conv2d(k.shape[1], k.shape[0], k.shape[2:], padding=1, bias=False) for k in kernels]
        for conv, kernel in zip(convs, kernels, strict=True):
            conv.weight.data = kernel
        self.convs = nn.ModuleList(convs)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """Return the output of each convolution."""
        return [conv(x) for conv, x in zip(self.convs, inputs, strict=True)]


def by_svd(kernels: list[Tensor], weaken: float, *, full: bool) -> tuple[float, float, Outcome]:
    """Return the same through SVDs of all unfoldings."""
    start = time.perf_counter()
    ranks = [
        {"out": _svd_rank(kernel, 0, weaken, full), "in": _svd_rank(kernel, 1, weaken, full)} for kernel in kernels
    ]
    middle = time.perf_counter()
    errors = [svd_hooi(kernel.flatten(2), rank, full) for kernel, rank in zip(kernels, ranks, strict=True)]
    return middle - start, time.perf_counter() - middle, list(zip(ranks, errors, strict=True))


def _svd_rank(kernel: Tensor, mode: int, weaken: float, full: bool, min_rank: int = 8) -> int:
    matrix = unfold(kernel, mode)
    values = torch.linalg.svd(matrix, full_matrices=full).S
    extreme, now = evbmf(values, matrix.shape[1]).rank, len(matrix)
    return now if extreme == 0 else max(int(now - weaken * (now - extreme)), min_rank)


def svd_hooi(kernel: Tensor, rank: Rank, full: bool, n_iter: int = 20, tol: float = 5e-4) -> float:
    """Return the relative error of HOOI on (out, in, K), every subspace from an SVD."""

    def leading(tensor: Tensor, mode: int, size: int) -> Tensor:
        return torch.linalg.svd(unfold(tensor, mode), full_matrices=full).U[:, :size]

    leading(kernel, 0, rank["out"])  # the HOSVD's other half, as general Tucker code computes it
    inner = leading(kernel, 1, rank["in"])
    total, captured = kernel.square().sum(), 0.0
    for _ in range(n_iter):
        out = leading(torch.einsum("oik,ib->obk", kernel, inner), 0, rank["out"])
        half = torch.einsum("oik,oa->aik", kernel, out)
        inner = leading(half, 1, rank["in"])
        now = float(torch.einsum("aik,ib->abk", half, inner).square().sum())
        done, captured = now - captured <= tol * total, now
        if done:
            break
    return float((1 - captured / total).clamp_min(0).sqrt())


def by_tensorly(kernels: list[Tensor], weaken: float) -> tuple[float, float, Outcome]:
    """Return the same as MUSCO does it: all singular vectors for the spectra, factors from TensorLy."""
    from tensorly.decomposition import partial_tucker

    start = time.perf_counter()
    ranks = [{name: _svd_rank(k, mode, weaken, full=True) for mode, name in enumerate(("out", "in"))} for k in kernels]
    middle = time.perf_counter()
    errors = []
    for kernel, rank in zip(kernels, ranks, strict=True):
        array = kernel.flatten(2).numpy()
        (core, _), _ = partial_tucker(array, rank=[rank["out"], rank["in"]], modes=[0, 1])
        errors.append(max(1 - float((core**2).sum() / (array**2).sum()), 0.0) ** 0.5)
    return middle - start, time.perf_counter() - middle, list(zip(ranks, errors, strict=True))


def _rank_gap(one: Outcome, other: Outcome) -> int:
    return max(abs(a[name] - b[name]) for (a, _), (b, _) in zip(one, other, strict=True) for name in a)


def _error_gap(one: Outcome, other: Outcome) -> float:
    return max(abs(a - b) for (_, a), (_, b) in zip(one, other, strict=True))


def table(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    env, config, rows = result["environment"], result["config"], result["rounds"]
    loads = [row["load"] for row in rows]
    head = HEAD.format(
        device=env["device_name"] or env["device"], torch=env["torch"], python=env["python"], threads=env["threads"],
        weaken=config["weaken"], rounds=config["rounds"], low=min(loads), high=max(loads),
    )  # fmt: skip
    lines = []
    for way in WAYS:
        own = [row for row in rows if row["way"] == way]
        parts = [statistics.median(row[key] for row in own) for key in ("ranks_s", "factors_s")]
        cells = [*parts, result["median_s"][way], result["fastest_s"][way], result["median_cpu_s"][way]]
        slower = f"{result['slower_than_tenfold'][way]:.1f} | {result['more_cpu_than_tenfold'][way]:.1f}"
        lines.append(f"| {way} | {' | '.join(f'{c:.2f}' for c in cells)} | {slower} |")
    foot = FOOT.format(ranks=result["largest_rank_difference"], errors=result["largest_error_difference"])
    return head + "\n".join(lines) + "\n" + foot


if __name__ == "__main__":
    main()
