"""Measure what ``tenfold compress`` itself costs: seconds of processor time and peak memory, in fresh processes.

    python -m benchmarks.own_cost.run --weights-dir FOLDER [--beside FOLDER] [--config FILE] [--out FILE] [--threads N]

``--beside`` is another source tree of tenfold, whose runs alternate with those of this one. An untimed run of each
comes first, in which the pictures are decoded. The time to import the package is measured likewise.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from tenfold.profiling import environment

HERE = Path(__file__).parent


def main() -> None:
    """Run both trees in turns and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights-dir", type=Path, required=True, help="folder with the dense weights")
    parser.add_argument("--beside", type=Path, help="another source tree, to be measured in turns with this one")
    parser.add_argument("--config", type=Path, default=HERE / "own_cost.yaml")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "own_cost.json")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    config = yaml.safe_load(options.config.read_text())
    trees = {"this": HERE.parent.parent} | ({} if options.beside is None else {"beside": options.beside.resolve()})
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
    for turn in range(config["repeats"] + 1):
        for name, tree in trees.items():
            arguments = config["arguments" if name == "this" else "arguments_beside"]
            found = run(tree, config | {"arguments": arguments}, options.weights_dir, options.threads)
            print(name, found, flush=True)
            if turn:
                runs[name].append(found)
    summary = {name: {key: median(r[key] for r in own) for key in own[0]} for name, own in runs.items()}
    result: dict[str, Any] = {"benchmark": "own_cost", "config": config, "threads": options.threads}
    result |= {"runs": runs, "median": summary, "environment": json.loads(environment().to_json())}
    if options.beside is not None:
        this, beside = summary["this"], summary["beside"]
        result["beside / this"] = {key: round(beside[key] / this[key], 2) for key in this}
    options.out.write_text(json.dumps(result, indent=1) + "\n")


def run(tree: Path, config: dict[str, Any], weights_dir: Path, threads: int) -> dict[str, float]:
    """Return the cost of one compression, its score, and the time to import the package."""
    words = ["compress", "--task", config["task"], "--weights", str(weights_dir / config["weights"])]
    words += [*shlex.split(config["arguments"]), "--seed", str(config["seed"])]
    with tempfile.TemporaryDirectory() as folder:
        seconds, peak = measured(["-m", "tenfold", *words, "--out", f"{folder}/out"], tree, threads)
        record = json.loads(Path(folder, "out", "record.json").read_text())
    imported, _ = measured(["-c", "import tenfold"], tree, threads)
    return {"cpu_s": seconds, "peak_mib": peak, "score": record["after"]["score"], "import_s": imported}


def measured(arguments: list[str], tree: Path, threads: int) -> tuple[float, float]:
    """Return processor seconds (user and system) and peak resident MiB of a Python process in a source tree."""
    environ = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen([sys.executable, *arguments], cwd=tree, env=environ, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return round(used.ru_utime + used.ru_stime, 3), round(used.ru_maxrss / 1024, 1)


if __name__ == "__main__":
    main()
