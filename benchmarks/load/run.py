"""Measure pairs of models alone and beside busy processes: does what is claimed then hold on the quiet machine?

    python -m benchmarks.load.run [--config FILE] [--out FOLDER]

Needs a machine that does nothing else: the busy processes are its own. Writes ``load.json`` and ``load.md``. Fails if
an interval that is claimed beside busy processes misses that of the quiet machine, or if four are not noticed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from tenfold.profiling import compare_latency, environment
from tenfold.records import Speedup

HERE = Path(__file__).parent
HEAD = """\
# Latencies beside other load

`python -m benchmarks.load.run` on {device}, torch {torch}, Python {python}, float32, {seconds:g} s a measurement. How
many times faster the second model of a pair is, alone and beside processes that do nothing but work. *Holds*: whether
the interval that is claimed meets the widest one of the quiet machine; a dash where nothing is claimed.

| pair | threads | busy | times faster | clock | holds | what it says |
|---|---:|---:|---:|---|---|---|
"""


def main() -> None:
    """Measure all pairs, write the results, and fail if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "load.yaml")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results")
    options = parser.parse_args()
    config = yaml.safe_load(options.config.read_text())
    rows: list[dict[str, Any]] = []
    for threads in config["threads"]:
        for name, pair in pairs().items():
            found = [
                {"pair": name, "threads": threads, "busy": number, **measured(pair, threads, number, config)}
                for number in config["busy"]
                for _ in range(config["repeats"])
            ]
            rows += judged(found)
            print(*(line(row) for row in rows[-len(found) :]), sep="\n", flush=True)
    result = {"benchmark": "load", "config": config, "rows": rows, "environment": environment().model_dump(mode="json")}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "load.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.out / "load.md").write_text(table(result))
    if not all(row["holds"] is not False and (row["load"] or row["busy"] < 4) for row in rows):
        raise SystemExit(1)


def pairs() -> dict[str, tuple[tuple[nn.Module, Any], tuple[nn.Module, Any]]]:
    """Return pairs of models with their inputs: of like and of very different durations."""
    torch.manual_seed(0)
    maps, rows = torch.randn(8, 64, 28, 28), torch.randn(64, 1024)
    wide = nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1) for _ in range(3)))
    thin = nn.Sequential(*(nn.Conv2d(64, 64, 1) for _ in range(3)))
    dense, low_rank = nn.Linear(1024, 1024), nn.Sequential(nn.Linear(1024, 128), nn.Linear(128, 1024))
    return {
        "3×3 and 1×1 convolutions": ((wide, maps), (thin, maps)),
        "linear, dense and of rank 128": ((dense, rows), (low_rank, rows)),
        "3×3 convolutions and one small layer": ((wide, maps), (nn.Linear(8, 8), torch.randn(4, 8))),
    }


def measured(pair: Any, threads: int, number: int, config: dict[str, Any]) -> dict[str, Any]:
    """Return what comparing a pair says beside so many busy processes."""
    with busy(number):
        result = compare_latency(dict(zip("ab", pair, strict=True)), seconds=config["seconds"], threads=threads)
    return {"speedup": result.speedups["b"].model_dump(mode="json"), "load": result.latencies["b"].load}


@contextmanager
def busy(number: int) -> Iterator[None]:
    """Keep so many processes working."""
    code = "print(flush=True)\nwhile True: pass"
    children = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(number)]
    try:
        for child in children:
            if child.stdout is not None:
                child.stdout.readline()  # it works
        yield
    finally:
        for child in children:
            child.kill()
            child.communicate()


def judged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of a pair with whether what each claims holds on the quiet machine; None if it claims nothing."""
    quiet = [row["speedup"] for row in rows if row["busy"] == 0]
    low, high = min(s["low"] for s in quiet), max(s["high"] for s in quiet)

    def holds(own: dict[str, Any]) -> bool | None:
        return None if own["doubt"] else own["low"] <= high and own["high"] >= low

    return [{**row, "holds": holds(row["speedup"])} for row in rows]


def table(result: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    made = result["environment"]
    device = made["device_name"] or made["device"]
    head = HEAD.format(device=device, torch=made["torch"], python=made["python"], seconds=result["config"]["seconds"])
    return head + "".join(f"{line(row)}\n" for row in result["rows"])


def line(row: dict[str, Any]) -> str:
    """Return one measurement as a line of the table."""
    own = Speedup(**row["speedup"])
    times = own.in_doubt.partition(":")[0] or f"{own.ratio:.3g} [{own.low:.3g}–{own.high:.3g}]"
    held = {None: "—", True: "yes", False: "**no**"}[row["holds"]]
    return f"| {row['pair']} | {row['threads']} | {row['busy']} | {times} | {own.clock} | {held} | {row['load']} |"


if __name__ == "__main__":
    main()
