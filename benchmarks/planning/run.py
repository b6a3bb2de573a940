"""Plan well-known networks for budgets: how long it takes, how near the budget and the optimum the plan is.

    python -m benchmarks.planning.run [--config FILE] [--out FOLDER] [--threads N]

All formats compete at all ranks of the grid (rule ``global``); the gap is the certificate of the knapsack.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.zoo import build
from tenfold.planning import plan
from tenfold.profiling import environment, profile
from tenfold.records import Recipe

HERE = Path(__file__).parent


def main() -> None:
    """Plan every network and write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "budgets.yaml")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = yaml.safe_load(options.config.read_text())
    rows = []
    for wanted in config["runs"]:
        rows.append(row(wanted, tuple(config["formats"]), config["seed"]))
        print(rows[-1], flush=True)
    result = {"benchmark": "planning", "rows": rows, "environment": json.loads(environment().to_json())}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "planning.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.out / "planning.md").write_text(table(result))


def row(wanted: dict[str, Any], formats: tuple[str, ...], seed: int) -> dict[str, Any]:
    """Return what came of one plan; the profile is made before the clock starts."""
    subject = build(wanted["name"], seed=seed)
    cost = profile(subject.model, subject.inputs)
    start = time.perf_counter()
    made = plan(subject.model, cost, Recipe(budget=wanted["budget"], formats=formats, seed=seed))
    seconds = time.perf_counter() - start
    used = {name: getattr(made.after, name) / getattr(made.before, name) for name in wanted["budget"]}
    gaps = {part for layer in made.factorized for part in layer.reason.split("gap ")[1:]}
    return {
        "name": wanted["name"],
        "budget": wanted["budget"],
        "used": {name: round(share, 5) for name, share in used.items()},
        "gap": max(gaps).rstrip(")") if gaps else "",
        "factorized": len(made.factorized),
        "layers": sum(layer.before.macs > 0 for layer in made.layers),
        "seconds": round(seconds, 2),
        "load": round(os.getloadavg()[0], 2),
    }


def table(result: dict[str, Any]) -> str:
    """Return the rows as Markdown."""
    env = result["environment"]
    lines = ["# Planning for a budget, from weights alone", ""]
    lines += [f"`python -m benchmarks.planning.run` on {env['device_name']}, {env['threads']} threads,"]
    lines += [f"torch {env['torch']}. Three formats at all ranks of the grid; the gap to the optimum is certified.", ""]
    lines += ["| network | budget | used | gap | factorized | seconds |", "| --- | --- | --- | --- | --- | --- |"]
    for r in result["rows"]:
        budget = ", ".join(f"{k} {v:.0%}" for k, v in r["budget"].items())
        used = ", ".join(f"{k} {v:.2%}" for k, v in r["used"].items())
        lines.append(
            f"| {r['name']} | {budget} | {used} | {r['gap']} | {r['factorized']} of {r['layers']} | {r['seconds']} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
