"""Measure the memory and the time that a model takes which is compressed block by block, each in a fresh process.

    python -m benchmarks.streaming.run [--config FILE] [--out FILE] [--only CASE]

Weights are random and in bfloat16; they are written to a temporary folder by another process. Memory is the peak of the
resident set of the whole process, and what it was before, with all packages imported; beside it stands what the run
said that it takes. A case may change the shape; ``estimates.yaml`` has such cases.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.zoo import supply_torchvision_ops
from tenfold import Runtime
from tenfold.errors import require
from tenfold.profiling import environment
from tenfold.streaming import compress_streamed

HERE = Path(__file__).parent


def main() -> None:
    """Run every case in a process of its own, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "streaming.yaml")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "streaming.json")
    parser.add_argument("--only", help="run this case alone, and keep the others of --out")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--here", help=argparse.SUPPRESS)
    options = parser.parse_args()
    config = yaml.safe_load(options.config.read_text())
    torch.set_num_threads(config["threads"])
    if options.write:
        written(config | config["cases"][options.here], options.write)
        return
    if options.here:
        print(json.dumps(run(config, options.here, options.config)))
        return
    found: dict[str, Any] = {}
    if options.only and options.out.exists():
        found = json.loads(options.out.read_text())["cases"]
    for name in config["cases"] if options.only is None else [options.only]:
        lines = subprocess.run(_words(options.config, name), check=True, stdout=subprocess.PIPE, text=True).stdout
        found[name] = json.loads(lines.splitlines()[-1])
        print(name, json.dumps(found[name]), flush=True)
        result = {"benchmark": "streaming", "config": config, "cases": found}
        result["environment"] = json.loads(environment().to_json())
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def written(config: dict[str, Any], folder: Path) -> None:
    """Write a model with random weights in shards."""
    supply_torchvision_ops()
    transformers: Any = require("transformers", "hf")
    shape = transformers.LlamaConfig(
        vocab_size=config["words"],
        hidden_size=config["width"],
        intermediate_size=config["hidden"],
        num_hidden_layers=config["blocks"],
        num_attention_heads=config["heads"],
        num_key_value_heads=config["key_value_heads"],
        dtype=torch.bfloat16,
    )
    torch.manual_seed(config["seed"])
    model = transformers.AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="40MB")


def run(config: dict[str, Any], name: str, source: Path) -> dict[str, Any]:
    """Return what one case takes: MiB, seconds, and the parameters before and after."""
    config, drawn = config | config["cases"][name], torch.Generator().manual_seed(config["seed"])
    size = (config.get("rows", 1), config["tokens"])
    data = [{"input_ids": torch.randint(config["words"], size, generator=drawn)} for _ in range(config["sequences"])]
    with tempfile.TemporaryDirectory() as there:
        dense = Path(there) / "dense"
        subprocess.run([*_words(source, name), "--write", str(dense)], check=True)
        supply_torchvision_ops()
        require("transformers", "hf").LlamaForCausalLM  # noqa: B018 - imported when it is asked for
        before, start = _peak(), time.perf_counter()
        with _watched(Path(there) / ".small.streaming") as largest:
            recipe = {"budget": config["budget"], **config.get("recipe", {})}
            runtime = Runtime(max_memory=config.get("max_memory"))
            found = compress_streamed(dense, Path(there) / "small", recipe, data=data, runtime=runtime)
        seconds = time.perf_counter() - start
        spent = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "before_mib": before,
        "peak_mib": _peak(),
        "estimated_mib": found.needs.memory / 2**20,
        "disk_mib": largest[0] / 2**20,
        "estimated_disk_mib": found.needs.disk / 2**20,
        "seconds": seconds,
        "processor_seconds": spent.ru_utime + spent.ru_stime,
        "by_step": found.record.seconds,
        "params": [found.record.before.params, found.record.after.params],
    }


@contextmanager
def _watched(folder: Path) -> Iterator[list[int]]:
    """Yield the largest number of bytes that the files in a folder have taken so far, one file of two names once."""
    found, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            sizes: dict[int, int] = {}
            for file in folder.rglob("*"):
                with suppress(OSError):  # it is gone already
                    seen = file.lstat()
                    sizes |= {seen.st_ino: seen.st_size} if file.is_file() else {}
            found[0] = max(found[0], sum(sizes.values()))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def _words(config: Path, name: str) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "benchmarks.streaming.run", "--config", str(config), "--here", name]


def _peak() -> float:
    """Return the peak of the resident set so far, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


if __name__ == "__main__":
    main()
