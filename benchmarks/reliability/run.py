"""Damage every file that tenfold reads, and kill commands at any moment.

    python -m benchmarks.reliability.run [--config FILE] [--out FOLDER] [--only fuzz|kills]

A damaged file is read as before, refused in one line, or read as another valid thing where people edit it. A command
that is killed and given again ends with the same bytes, and leaves nothing behind.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.reliability.fuzz import fuzz, quietly, targets
from benchmarks.reliability.kills import COMMANDS, kill
from tenfold.profiling import environment

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"


def main() -> None:
    """Run, and write JSON and Markdown; end with an error where there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "reliability.yaml")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", choices=["fuzz", "kills"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = yaml.safe_load(options.config.read_text())
    file = options.out / "reliability.json"
    result: dict[str, Any] = json.loads(file.read_text()) if options.only and file.exists() else {}
    result |= {"benchmark": "reliability", "config": config}
    if options.only != "kills":
        result["files"] = damage(config)
    if options.only != "fuzz":
        result["commands"] = end(config)
    result["environment"] = json.loads(environment().to_json())
    options.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "reliability.md").write_text(report(result))
    faults = sum(len(own["faults"]) for own in result.get("files", {}).values())
    faults += sum(len(one["faults"]) for own in result.get("commands", {}).values() for one in own)
    raise SystemExit(f"{faults} faults" if faults else 0)


def damage(config: dict[str, Any]) -> dict[str, Any]:
    """Return for every kind of file how often a damaged one was read the same, refused, or read as another."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, target in quietly(lambda: targets(Path(folder))).items():
            start = time.perf_counter()
            counts, faults = quietly(lambda: fuzz(target, config["flips"], config["truncations"], config["seed"]))  # noqa: B023
            found[name] = {"editable": target.editable, "outcomes": dict(counts), "faults": faults}
            print(name, dict(counts), f"{time.perf_counter() - start:.0f} s", *faults[:5], flush=True)
    return found


def end(config: dict[str, Any]) -> dict[str, Any]:
    """Return for every command what became of each kill."""
    found = {}
    for name in COMMANDS:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = list(kill(name, config["kills"], Path(folder), config["seed"]))
        print(name, found[name], flush=True)
    return found


def report(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    config, files, commands = result["config"], result.get("files", {}), result.get("commands", {})
    lines = [f"# {config['title']}", ""]
    lines += [
        f"{config['flips']} bit flips and {config['truncations']} truncations of every file, seed {config['seed']}."
    ]
    lines += ["", "| file | read the same | refused in one line | read as another valid one | faults |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    for name, own in files.items():
        counts = [own["outcomes"].get(outcome, 0) for outcome in ("same", "refused", "another")]
        lines.append(f"| {name} | {' | '.join(map(str, counts))} | {len(own['faults'])} |")
    lines += ["", f"{config['kills']} kills of every command, each given again afterwards.", ""]
    lines += ["| command | killed while running | same bytes, nothing left | faults |", "| --- | --- | --- | --- |"]
    for name, own in commands.items():
        fine = sum(not one["faults"] for one in own)
        lines.append(f"| {name} | {sum(one['killed'] for one in own)} | {fine} of {len(own)} | {len(own) - fine} |")
    e = result["environment"]
    lines += ["", f"{e['device_name'] or e['device']}, torch {e['torch']}, Python {e['python']}, {e['platform']}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
