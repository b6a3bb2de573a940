"""Kill a run in stages at random moments: does the same command end with the identical checkpoint each time?

    python -m benchmarks.stages.run [--config FILE] [--out FOLDER] [--work FOLDER]

The command runs once undisturbed. Then it begins anew again and again, each time to be killed with signal 9 and given
once more, which is left to end. The moments are drawn from a seed, one in each of as many equal parts of the
undisturbed run as there are kills. All files of weights, of each stage and of the outcome, are compared byte by byte.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from tenfold.cli import main as tenfold_command
from tenfold.profiling import environment
from tenfold.tasks import load_task

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
WEIGHTS = "dense.safetensors"


def main() -> None:
    """Run undisturbed, run killed, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "kills.yaml")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, help="where the runs are kept; a temporary folder by default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = yaml.safe_load(options.config.read_text())
    work = options.work or Path(tempfile.mkdtemp())
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    result = compare(config, work)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "stages.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.out / "stages.md").write_text(report(result))
    if options.work is None:
        shutil.rmtree(work)


def compare(config: dict[str, Any], work: Path) -> dict[str, Any]:
    """Return what came of the undisturbed and of the killed run."""
    save_file(load_task(config["task"]).dense().state_dict(), work / WEIGHTS)
    start = time.perf_counter()
    code = ended(begin(config, work, "whole"))
    seconds = time.perf_counter() - start
    if code:
        sys.exit(f"the undisturbed run failed with exit code {code}")
    draw = random.Random(config["seed"])  # noqa: S311 - moments, not secrets
    one, kills = files(work, "whole"), list[dict[str, Any]]()
    while len(kills) < config["kills"]:
        delay = (len(kills) + draw.random()) / config["kills"] * seconds
        found = kill_after(config, work, delay)
        if found is not None:
            code = ended(begin(config, work, "killed"))
            found |= {"exit_code_at_the_end": code, "identical": files(work, "killed") == one and bool(one)}
            kills.append(found)
            sys.stderr.write(f"kill {len(kills)} after {delay:.1f} s: {found['on_disk']}\n")
        for folder in (work / "killed", work / "killed.stages"):  # ended before it could be killed: another moment
            shutil.rmtree(folder, ignore_errors=True)
    return {
        "command": f"tenfold {config['command']} --task {config['task']} --weights {WEIGHTS} --out FOLDER",
        "seconds_undisturbed": round(seconds, 1),
        "kills": kills,
        "identical": all(kill["identical"] for kill in kills),
        "files": one,
        "environment": environment().model_dump(mode="json"),
    }


def begin(config: dict[str, Any], work: Path, name: str) -> int:
    """Start the command, which writes to the folder ``name``, in a process of its own; return the id of that.

    The process is a fork of this one, which has imported everything: so that kills hit the work, and not the imports.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            options = ["--task", config["task"], "--weights", str(work / WEIGHTS), "--out", str(work / name)]
            with Path(os.devnull).open("w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
                code = tenfold_command([*shlex.split(config["command"]), *options])
        finally:
            os._exit(code)
    return child


def ended(child: int) -> int:
    """Wait for a process; return its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_after(config: dict[str, Any], work: Path, delay: float) -> dict[str, Any] | None:
    """Return where the command was when it was killed; None if it ended by itself."""
    child = begin(config, work, "killed")
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    if ended(child) == -signal.SIGKILL:
        return {"after_seconds": round(delay, 1), "on_disk": on_disk(work / "killed.stages")}
    return None


def on_disk(folder: Path) -> str:
    """Return in words what a killed run left."""
    if not folder.is_dir():
        return "nothing"
    done = len(list(folder.glob("stage-*")))
    work = folder / f".stage-{done + 1:04}"
    state = "no stage at work"
    if (work / "training" / "tuning.safetensors").is_file():
        state = f"stage {done + 1} in training"
    elif (work / "start").is_dir():
        state = f"stage {done + 1} begun"
    return f"{done} stages complete, {state}"


def files(work: Path, name: str) -> dict[str, str]:
    """Return the digests of all weights of a run, by file."""
    folders = {"outcome": work / name} | {p.name: p for p in sorted((work / f"{name}.stages").glob("stage-*"))}
    found = {}
    for key, folder in folders.items():
        path = folder / "model.safetensors"
        if path.is_file():
            found[key] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def report(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    e = result["environment"]
    lines = [f"`{result['command']}`", "", "| kill | after | on disk then | all files at the end |"]
    lines += ["| ---: | ---: | --- | --- |"]
    for n, kill in enumerate(result["kills"], 1):
        same = "identical" if kill["identical"] else "**not identical**"
        lines.append(f"| {n} | {kill['after_seconds']} s | {kill['on_disk']} | {same} |")
    lines += ["", "| file | SHA-256 |", "| --- | --- |"]
    lines += [f"| {name} | `{digest[:16]}` |" for name, digest in result["files"].items()]
    same = "ended with" if result["identical"] else "did NOT all end with"
    lines += [
        "",
        f"{len(result['kills'])} runs, each killed once and begun again, {same} the files of an undisturbed one,",
    ]
    where = f"on {e['device_name']}, 1 thread, torch {e['torch']}, {e['platform']}."
    lines += [f"which takes {result['seconds_undisturbed']} s, the machine busy with other things, {where}"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
