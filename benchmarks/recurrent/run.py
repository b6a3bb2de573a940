"""Time factorized GRUs and LSTMs against torch's own: the inputs' matrix alone, and both, in torch and ONNX Runtime.

    python -m benchmarks.recurrent.run [--config FILE] [--out FOLDER] [--runtime torch]

One thread, by the clock of the processor. Every round runs each network once, one after the other; ratios are medians
of the ratios of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from tenfold.exporting import ExportConfig, export, open_exported
from tenfold.planning import plan
from tenfold.profiling import profile
from tenfold.profiling.environment import environment
from tenfold.surgery import apply, unroll_rnns

HERE = Path(__file__).parent
Row = dict[str, Any]

HEAD = """\
# Factorized recurrent layers

`python -m benchmarks.recurrent.run --runtime {runtime}`, torch {torch}, one thread, float32: one GRU or LSTM, inputs as
wide as its states, matrices of low rank on the side of the inputs, or on both. How many times as fast as torch's own
in the same runtime, by the clock of the processor, medians of {rounds} rounds or more in turns (10 to 90 %); load of
the machine (1 min) between {low:.1f} and {high:.1f}, this benchmark included.

| network | hidden | batch | steps | rank | dense µs | inputs factorized | both |
|---|---:|---:|---:|---:|---:|---:|---:|
"""
ROUNDS = 15


class First(nn.Module):
    """A network without its last state."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.rnn = network

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.rnn(x)[0]
        return out


def main() -> None:
    """Measure and write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "recurrent.yaml")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results")
    parser.add_argument("--runtime", choices=["torch", "onnxruntime"], default="torch")
    options = parser.parse_args()
    config = yaml.safe_load(options.config.read_text())
    torch.set_num_threads(1)
    rows, loads = [], [os.getloadavg()[0]]
    sizes = ("kinds", "hidden", "batches", "steps", "shares")
    for kind, hidden, batch, steps, share in product(*(config[name] for name in sizes)):
        torch.manual_seed(config["seed"])
        row = {"kind": kind, "hidden": hidden, "batch": batch, "steps": steps, "rank": hidden // share}
        rows.append(row | timed(row, options.runtime, config["seconds"]))
        loads.append(os.getloadavg()[0])
        print(line(rows[-1]), flush=True)
    result = {"benchmark": "recurrent", "config": config, "runtime": options.runtime, "rows": rows, "load": loads}
    result["environment"] = json.loads(environment(torch.device("cpu")).to_json())
    options.out.mkdir(parents=True, exist_ok=True)
    name = "recurrent" if options.runtime == "torch" else f"recurrent_{options.runtime}"
    (options.out / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    head = HEAD.format(runtime=options.runtime, torch=torch.__version__, rounds=ROUNDS, low=min(loads), high=max(loads))
    (options.out / f"{name}.md").write_text(head + "\n".join(map(line, rows)) + "\n")


def timed(row: Row, runtime: str, seconds: float) -> Row:
    """Return the time of the dense network, and ratios to those of the factorized ones."""
    dense = First(getattr(nn, row["kind"])(row["hidden"], row["hidden"], batch_first=True)).eval()
    x = torch.randn(max(row["batch"], 2), row["steps"], row["hidden"])
    opened = unroll_rnns(dense)
    cost = profile(opened, x)
    networks: dict[str, nn.Module] = {"dense": dense}
    for name, sides in (("inputs", ("ih",)), ("both", ("ih", "hh"))):
        ranks = {f"rnn.cells.0.{side}": row["rank"] for side in sides}
        networks[name] = apply(dense, plan(opened, cost, {"rule": {"name": "fixed", "ranks": ranks}}))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        if runtime == "onnxruntime":
            for name, network in networks.items():
                export(network, x, f"{folder}/{name}.onnx", config=ExportConfig(seconds=0))
                networks[name] = open_exported(f"{folder}/{name}.onnx")
        return in_turns(networks, x[: row["batch"]].clone(), seconds)


def in_turns(networks: dict[str, nn.Module], x: Tensor, seconds: float) -> Row:
    """Return median microseconds of the first network, and how many times as fast the others are."""
    times: dict[str, list[int]] = {name: [] for name in networks}
    for network in networks.values():
        network(x)
    end = time.perf_counter() + seconds * len(networks)
    while time.perf_counter() < end or len(times["dense"]) < ROUNDS:
        for name, network in networks.items():
            start = time.process_time_ns()
            network(x)
            times[name].append(time.process_time_ns() - start)
    found: Row = {"dense_us": statistics.median(times["dense"]) / 1000}
    for name in list(networks)[1:]:
        ratios = [one / other for one, other in zip(times["dense"], times[name], strict=True)]
        tenths = statistics.quantiles(ratios, n=10)
        found[name] = [statistics.median(ratios), tenths[0], tenths[-1]]
    return found


def line(row: Row) -> str:
    """Return a row of the table."""
    ratios = [f"{middle:.2f} ({low:.2f}–{high:.2f})" for middle, low, high in (row["inputs"], row["both"])]
    cells = [row["kind"], *(row[name] for name in ("hidden", "batch", "steps", "rank")), f"{row['dense_us']:.0f}"]
    return f"| {' | '.join(map(str, [*cells, *ratios]))} |"


if __name__ == "__main__":
    main()
