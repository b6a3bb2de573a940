"""Kill a streamed compression by SIGKILL at moments spread over its time, go on with it, and compare the bytes.

    python -m benchmarks.streaming.kills [--config FILE] [--out FILE]

Each run is a process of its own. A moment is a share of the time that a run takes which nobody kills, from when its
work begins.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.streaming.run import written
from benchmarks.zoo import supply_torchvision_ops
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
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    config = yaml.safe_load(options.config.read_text())
    torch.set_num_threads(config["threads"])
    if options.here:
        compress(config, options.here)
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        written(config, folder / "dense")
        words = [sys.executable, "-W", "ignore", "-m", "benchmarks.streaming.kills", "--config", str(options.config)]
        words += ["--here", place]
        whole = finished(words, folder)
        seconds, wanted = whole["seconds"], whole["digests"]
        moments = []
        for number in range(config["moments"]):
            share = (number + 0.5) / config["moments"]
            found = killed(words, folder, share * seconds) | {"share": share}
            again = finished(words, folder)
            found |= {"seconds_to_go_on": again["seconds"], "same_bytes": again["digests"] == wanted}
            moments.append(found)
            print(json.dumps(found), flush=True)
    result = {"benchmark": "streaming_kills", "config": config, "seconds": seconds, "moments": moments}
    result["environment"] = json.loads(environment().to_json())
    options.out.write_text(json.dumps(result, indent=1) + "\n")


def compress(config: dict[str, Any], folder: Path) -> None:
    """Compress what lies in ``dense``, or go on with that."""
    supply_torchvision_ops()
    drawn = torch.Generator().manual_seed(config["seed"])
    size = (1, config["tokens"])
    data = [{"input_ids": torch.randint(config["words"], size, generator=drawn)} for _ in range(config["sequences"])]
    runtime = Runtime(folder=folder / "work")
    compress_streamed(folder / "dense", folder / "small", config["budget"], data=data, runtime=runtime)


def killed(words: list[str], folder: Path, seconds: float) -> dict[str, Any]:
    """Kill a run so long after its work began; return how many files it had finished by then."""
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as process:
        _begin(process, folder)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        ended = process.wait() != -signal.SIGKILL
    files = [file.name for file in (folder / "work").glob("*") if not file.name.endswith(".partial")]
    return {"seconds": seconds, "ended_before": ended, "files": len(files), "wrote": (folder / "small").exists()}


def finished(words: list[str], folder: Path) -> dict[str, Any]:
    """Run to the end; return how long the work took and the digests of the new weights, and remove both."""
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as process:
        if not (folder / "small").exists():
            _begin(process, folder)
        start = time.perf_counter()
        process.wait()
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (folder / "small").glob("model*")}
    seconds = time.perf_counter() - start
    for name in ("small", "work"):
        shutil.rmtree(folder / name)
    return {"seconds": seconds, "digests": digests}


def _begin(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait until the work of a process begins."""
    while not (folder / "work" / ".lock").exists():
        if process.poll() is not None:
            msg = f"the run ended with {process.returncode} before its work began"
            raise RuntimeError(msg)
        time.sleep(POLL)


if __name__ == "__main__":
    main()
