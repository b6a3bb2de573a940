"""Run the experiments of a YAML file through ``tenfold compress`` and keep what came of them.

    python -m benchmarks.compress.run benchmarks/compress/resnet56_tucker2.yaml --weights-dir FOLDER [--only NAME]

Every run is a command line of its own; its JSON goes to ``benchmarks/results/EXPERIMENT.json`` together with the
command, and a table of all of them beside it. Runs that are in the result already are not repeated unless ``--again``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

RESULTS = Path(__file__).parent.parent / "results"


def main() -> None:
    """Run what is missing and write JSON and a Markdown table after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--weights-dir", type=Path, required=True, help="folder with the dense weights")
    parser.add_argument("--only", help="run only experiments with this in their name")
    parser.add_argument("--again", action="store_true", help="repeat runs that have a result")
    options = parser.parse_args()
    experiment = yaml.safe_load(options.experiment.read_text())
    target = RESULTS / f"{options.experiment.stem}.json"
    result = json.loads(target.read_text()) if target.is_file() else {"experiment": options.experiment.stem, "runs": {}}
    for name, arguments in experiment["runs"].items():
        if (options.only and options.only not in name) or (name in result["runs"] and not options.again):
            continue
        print(name, "...", flush=True)
        result["runs"][name] = run(experiment, arguments, options.weights_dir)
        target.write_text(json.dumps(result, indent=1) + "\n")
        target.with_suffix(".md").write_text(table(experiment, result))
        print(row(name, result["runs"][name]), flush=True)


def run(experiment: dict[str, Any], arguments: str, weights_dir: Path) -> dict[str, Any]:
    """Return the JSON of one ``tenfold compress``, with the command that gave it."""
    weights = experiment["weights"]
    words = ["compress", "--task", experiment["task"], *shlex.split(arguments)]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tenfold", *words, "--weights", str(weights_dir / weights), "--json"]
        done = subprocess.run([*command, "--out", f"{folder}/out"], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    found["command"] = shlex.join(["tenfold", *words, "--weights", weights])
    return found


def table(experiment: dict[str, Any], result: dict[str, Any]) -> str:
    """Return all runs as Markdown."""
    lines = [f"# {experiment['title']}", "", experiment.get("text", "").strip(), ""]
    lines += ["| run | top-1 | MACs | params | latency | seconds |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    lines += [row(name, found) for name, found in result["runs"].items()]
    lines += ["", "Commands:", "", "```"] + [found["command"] for found in result["runs"].values()] + ["```"]
    env = next(iter(result["runs"].values()))["environment"]
    lines += ["", f"On {env['device_name'] or env['device']}, {env['threads']} threads, torch {env['torch']}."]
    return "\n".join(lines) + "\n"


def row(name: str, found: dict[str, Any]) -> str:
    """Return one line of the table; shares are those of the dense network."""
    before, after = found["before"], found["after"]
    cells = [
        f"{before['score']:.2%} → {after['score']:.2%}",
        f"{after['macs'] / before['macs']:.1%}",
        f"{after['params'] / before['params']:.1%}",
        f"{before['latency_ms']:.1f} → {after['latency_ms']:.1f} ms" if after["latency_ms"] else "",
        f"{sum(found['seconds'].values()):.0f}",
    ]
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
