"""Time CP by alternating least squares, in turns with TensorLy: at equal sweeps and at equal error.

    python -m benchmarks.cp_als.run [--weights FOLDER] [--config FILE] [--out FOLDER]

Everything is float32 on one thread and starts at random. Seconds are those that the processor spent on the call, which
other processes do not change much; the two run in turns, and what counts is the median of the ratios of each turn.
Trained kernels are skipped without ``--weights``, the folder that holds the checkpoint; those of a whole stage are
decomposed together, and by TensorLy one after the other. Memory is the most that all tensors of the call take at once.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.hooi.run import make
from tenfold.decompositions import Fit, FitRequest, decompose_many, spec_of_weight
from tenfold.decompositions.cp.als import CPALS
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
    options = parser.parse_args()
    config = yaml.safe_load(options.config.read_text())
    torch.set_num_threads(config["threads"])
    result: dict[str, Any] = {"benchmark": "cp_als", "config": config, "load_before": os.getloadavg(), "kernels": []}
    for wanted in config["kernels"]:
        weights = load(wanted, config, options.weights)
        if weights is None:
            print(f"skipped {wanted['name']}: no --weights", file=sys.stderr)
            continue
        row = {"name": wanted["name"], "rank": wanted["rank"], "sweeps": wanted["sweeps"]}
        row |= compare(weights, wanted, config["seed"])
        row["memory"] = memory(weights, wanted["rank"], config["seed"])
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


def load(wanted: dict[str, Any], config: dict[str, Any], folder: Path | None) -> list[Tensor] | None:
    """Return the kernels: a seeded one, or those of trained layers; None where they are not there."""
    if wanted["weights"] != "trained":
        return [make(wanted["weights"], tuple(wanted["shape"]), config["seed"])]
    if folder is None:
        return None
    from safetensors.torch import load_file

    state = load_file(folder / config["checkpoint"])
    if "layer" in wanted:
        return [state[wanted["layer"]].float()]
    shape = tuple(wanted["shape"])
    return [w.float() for name, w in state.items() if name.startswith(wanted["stage"]) and tuple(w.shape) == shape]


def compare(weights: list[Tensor], wanted: dict[str, Any], seed: int) -> dict[str, Any]:
    """Return seconds and errors of both, and the sweeps and seconds that TensorLy's error takes here.

    Of several kernels the errors are root mean squares. tenfold decomposes them together, TensorLy one by one.
    """
    require("tensorly", "dev")
    import tensorly
    from tensorly.decomposition import parafac

    tensorly.set_backend("pytorch")
    rank, sweeps = wanted["rank"], wanted["sweeps"]
    found: dict[str, Any] = {}

    def ours(n_iter: int = sweeps) -> None:
        found["tenfold"] = fit(weights, rank, n_iter, seed)

    def theirs() -> None:
        settings = {"n_iter_max": sweeps, "init": "random", "random_state": seed, "tol": None}
        found["tensorly"] = [parafac(w.flatten(2), rank, **settings) for w in weights]

    fit(weights, rank, 2, seed)  # warm-up
    pairs = [(timed(ours), timed(theirs)) for _ in range(wanted["rounds"])]
    error = together(found["tenfold"])
    missed = [
        rel_error(tensorly.cp_to_tensor(f).double(), w.flatten(2).double())
        for f, w in zip(found["tensorly"], weights, strict=True)
    ]
    theirs_error = statistics.mean(e**2 for e in missed) ** 0.5
    enough = first_below(weights, rank, sweeps, theirs_error, seed)
    at_error = [timed(lambda: ours(enough)) for _ in range(wanted["rounds"])]
    factors = [list(f.value.tensors().values()) for f in found["tenfold"]]
    others = [[f[None] for f in found.factors] for found in found["tensorly"]]
    return {
        "kernels": len(weights),
        "tensorly_version": tensorly.__version__,
        "seconds": [[round(a, 4), round(b, 4)] for a, b in pairs],
        "tenfold_median": statistics.median(a for a, _ in pairs),
        "tensorly_median": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(b / a for a, b in pairs),
        "rel_error": error,
        "tensorly_rel_error": theirs_error,
        "sensitivity": statistics.median(map(sensitivity, factors, weights)),
        "tensorly_sensitivity": statistics.median(map(sensitivity, others, weights)),
        "sweeps_to_their_error": enough,
        "seconds_to_their_error": at_error,
        "ratio_at_error": statistics.median(b for _, b in pairs) / statistics.median(at_error),
    }


def fit(weights: list[Tensor], rank: int, n_iter: int, seed: int) -> list[Fit]:
    """Return the CPs of order 3 after at most so many sweeps."""
    algorithm = CPALS(n_iter=n_iter, tol=0.0, start="random", seed=seed)
    return decompose_many([FitRequest(w, spec_of_weight(w), "cp3", {"rank": rank}, algorithm) for w in weights])


def together(fits: list[Fit]) -> float:
    """Return the root mean square of the relative errors."""
    return math.sqrt(statistics.mean(fit.rel_error**2 for fit in fits))


def sensitivity(factors: list[Tensor], weight: Tensor) -> float:
    """Return the least sensitivity of factors over all scalings, as a share of the squared norm of the kernel."""
    return float(kruskal.least_sensitivity([f.double() for f in factors])) / float(weight.double().square().sum())


def first_below(weights: list[Tensor], rank: int, sweeps: int, error: float, seed: int) -> int:
    """Return the least number of sweeps after which the error is no larger, by bisection; ``sweeps`` if none is."""
    low, high = 0, sweeps
    while high - low > 1:
        middle = (low + high) // 2
        if together(fit(weights, rank, middle, seed)) <= error:
            high = middle
        else:
            low = middle
    return high


def memory(weights: list[Tensor], rank: int, seed: int) -> float:
    """Return the most memory that tensors take at once in a fit, in sizes of the kernels, which count as one."""
    own: int = sum(w.numel() * w.element_size() for w in weights)
    with Alive() as alive:
        fit(weights, rank, 10, seed)
    return 1 + int(alive.peak) / own


class Alive(TorchDispatchMode):
    """Adds up the bytes of all storages that were made within the context and are alive, and keeps the largest sum."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return what the operation returns."""
        given = {_storage(t)[0] for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _storage(tensor)[0] not in given | self._known:
                key, size = _storage(tensor)
                self._known.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(tensor.untyped_storage(), self._free, key, size)
        return result

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _storage(tensor: Tensor) -> tuple[int, int]:
    """Return the identity and the bytes of what holds a tensor."""
    storage = tensor.untyped_storage()
    return storage._cdata, storage.nbytes()  # noqa: SLF001 - data_ptr is no identity: it is 0 for all empty ones


def timed(run: Callable[[], object]) -> float:
    """Return the processor seconds that one call takes."""
    start = time.process_time()
    run()
    return time.process_time() - start


def line(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    return (
        f"| {row['name']} | {row['rank']} | {row['tenfold_median']:.2f} s | {row['tensorly_median']:.2f} s | "
        f"{row['ratio']:.1f} | {row['rel_error']:.4f} | {row['tensorly_rel_error']:.4f} | "
        f"{row['sensitivity']:.3g} | {row['tensorly_sensitivity']:.3g} | {row['sweeps_to_their_error']} | "
        f"{row['ratio_at_error']:.1f} | {row['memory']:.1f}× |"
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
            "columns: sweeps of tenfold that reach TensorLy's error, and how many times faster that is; most memory of "
            "all tensors at once, in sizes of the kernels, these included."
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
