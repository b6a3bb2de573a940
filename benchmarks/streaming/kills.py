"""Kill a streamed compression by SIGKILL at moments spread over its work, go on with it, and compare the bytes.

    python -m benchmarks.streaming.kills [--config FILE] [--out FILE]

Each run is a process of its own. A moment is a share of the files that a run makes which nobody kills, and up to a
tenth of a second more: so that it lies within the step after.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import shutil
import signal
import tempfile
import time
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.streaming.run import written
from tenfold import Runtime
from tenfold.profiling import environment
from tenfold.streaming import compress_streamed

HERE = Path(__file__).parent
POLL = 0.005  # seconds


def main() -> None:
    """Run and kill, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "kills.yaml")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "streaming_kills.json")
    options = parser.parse_args()
    config = yaml.safe_load(options.config.read_text())
    torch.set_num_threads(config["threads"])
    # A fork of this process could take no gradients; one of a server that has only imported can.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.streaming.prepared"])
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        written(config, folder / "dense")
        start = partial(context.Process, target=compress, args=(config, folder))
        whole = finished(start(), folder)
        drawn = torch.Generator().manual_seed(config["seed"])
        moments = []
        for number in range(config["moments"]):
            files = int((number + 0.5) / config["moments"] * whole["files"])
            found = killed(start(), folder, files, 0.1 * float(torch.rand((), generator=drawn)))
            again = finished(start(), folder)
            found |= {"files_after": again["files"], "same_bytes": again["digests"] == whole["digests"]}
            moments.append(found)
            print(json.dumps(found), flush=True)
    result = {"benchmark": "streaming_kills", "config": config, "files": whole["files"], "moments": moments}
    result["environment"] = json.loads(environment().to_json())
    options.out.write_text(json.dumps(result, indent=1) + "\n")


def compress(config: dict[str, Any], folder: Path) -> None:
    """Compress what lies in ``dense``, or go on with that."""
    torch.set_num_threads(config["threads"])
    drawn = torch.Generator().manual_seed(config["seed"])
    size = (1, config["tokens"])
    data = [{"input_ids": torch.randint(config["words"], size, generator=drawn)} for _ in range(config["sequences"])]
    runtime = Runtime(folder=folder / "work")
    compress_streamed(folder / "dense", folder / "small", config["budget"], data=data, runtime=runtime)


def killed(process: BaseProcess, folder: Path, files: int, delay: float) -> dict[str, Any]:
    """Kill a run as soon as it has made so many files, or a little later; return what it had made by then."""
    made: set[str] = set()
    process.start()
    while len(made) < files and process.is_alive():
        made |= _files(folder)
        time.sleep(POLL)
    time.sleep(delay)
    process.kill()
    process.join()
    ended = process.exitcode != -signal.SIGKILL
    last = max((folder / "work").glob("*"), key=lambda file: file.stat().st_mtime_ns, default=folder).name
    return {"files": len(made), "last": last, "ended_before": ended, "wrote": (folder / "small").exists()}


def finished(process: BaseProcess, folder: Path) -> dict[str, Any]:
    """Run to the end; return how many files that made and the digests of the new weights, and remove both."""
    made: set[str] = set()
    before = _files(folder)
    process.start()
    while process.is_alive():
        made |= _files(folder)
        time.sleep(POLL)
    weights = (folder / "small").glob("model*")
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in weights}
    for name in ("small", "work"):
        shutil.rmtree(folder / name)
    return {"files": len(made - before), "digests": digests}


def _files(folder: Path) -> set[str]:
    """Return the names of the files that a run has made whole."""
    return {file.name for file in (folder / "work").glob("[!.]*")}


if __name__ == "__main__":
    main()
