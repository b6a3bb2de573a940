"""Measure what a streamed run costs beyond its products and decompositions, which are timed alone, one by one.

    python -m benchmarks.streaming.own_time [--config FILE] [--out FILE]

Every matrix product and every decomposition of a run is counted with its shapes: those of the forwards and of the
backward passes are among the products. Afterwards each shape runs alone on random numbers. The ratio is the processor
time of the whole run to the sum of these.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.streaming.run import written
from benchmarks.zoo import supply_torchvision_ops
from tenfold.profiling import environment
from tenfold.streaming import compress_streamed

HERE = Path(__file__).parent
ATEN = torch.ops.aten
PRODUCTS = {ATEN.mm.default, ATEN.bmm.default, ATEN.addmm.default, ATEN.baddbmm.default, ATEN.addmm_.default}
PRODUCTS |= {ATEN.baddbmm_.default}
SQUARES = {ATEN._linalg_eigh.default, ATEN.linalg_cholesky_ex.default, ATEN.cholesky_inverse.default}  # noqa: SLF001
OTHERS = {ATEN._linalg_svd.default, ATEN.linalg_qr.default, ATEN._linalg_solve_ex.default}  # noqa: SLF001
OTHERS |= {ATEN.cholesky_solve.default, ATEN.linalg_solve_triangular.default}
LEAST = 0.1  # seconds that a shape is timed for at least

Key = tuple[Any, tuple[Any, ...], tuple[tuple[str, Any], ...]]


def main() -> None:
    """Run, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "own_time.yaml")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "streaming_own_time.json")
    options = parser.parse_args()
    config = yaml.safe_load(options.config.read_text())
    torch.set_num_threads(config["threads"])
    supply_torchvision_ops()
    drawn = torch.Generator().manual_seed(config["seed"])
    size = (1, config["tokens"])
    data = [{"input_ids": torch.randint(config["words"], size, generator=drawn)} for _ in range(config["sequences"])]
    with tempfile.TemporaryDirectory() as there:
        written(config, Path(there) / "dense")
        counter = Counted()
        start = time.process_time()
        with counter:
            found = compress_streamed(Path(there) / "dense", Path(there) / "small", config["budget"], data=data)
        whole = time.process_time() - start
    bare: dict[str, float] = {}
    for key, count in counter.counts.items():
        bare[str(key[0])] = bare.get(str(key[0]), 0.0) + alone(key) * count
    result = {
        "benchmark": "streaming_own_time",
        "config": config,
        "seconds": whole,
        "bare_seconds": sum(bare.values()),
        "ratio": whole / sum(bare.values()),
        "by_operation": bare,
        "by_step": found.record.seconds,
        "environment": json.loads(environment().to_json()),
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: result[name] for name in ("seconds", "bare_seconds", "ratio", "by_operation")}))


class Counted(TorchDispatchMode):
    """Counts products and decompositions by their shapes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[Key] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count it unless it fails."""
        result = func(*args, **(kwargs or {}))
        if func in PRODUCTS | SQUARES | OTHERS and not any(isinstance(t, Tensor) and t.is_meta for t in args):
            tensors = tuple((tuple(t.shape), t.dtype) if isinstance(t, Tensor) else t for t in args)
            self.counts[func, tensors, tuple((kwargs or {}).items())] += 1
        return result


def alone(key: Key) -> float:
    """Return the processor time of one operation on random numbers of these shapes."""
    operation, arguments, named = key
    drawn = torch.Generator().manual_seed(0)
    made = [_made(argument, operation in SQUARES, drawn) for argument in arguments]
    operation(*made, **dict(named))
    start, runs = time.process_time(), 0
    while time.process_time() - start < LEAST:
        operation(*made, **dict(named))
        runs += 1
    return (time.process_time() - start) / runs


def _made(argument: Any, square: bool, drawn: torch.Generator) -> Any:
    if not (isinstance(argument, tuple) and len(argument) == 2 and isinstance(argument[1], torch.dtype)):
        return argument
    shape, dtype = argument
    values = torch.randn(shape, generator=drawn)
    if square:
        values = values @ values.mT / shape[-1] + torch.eye(shape[-1])
    return values.to(dtype)


if __name__ == "__main__":
    main()
