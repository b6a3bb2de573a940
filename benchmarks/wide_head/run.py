"""Measure what ``compress`` costs on networks with a head of a whole vocabulary, each in a fresh process.

    python -m benchmarks.wide_head.run [--config FILE] [--out FILE] [--only CASE] [--profile]

Seconds are those of the processor, with one thread. Memory is the peak of the resident set above what the process
needed to build the network and run one batch through it. ``--profile`` prints the functions that took the most time
instead of writing a file.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from benchmarks.zoo import supply_torchvision_ops
from tenfold.errors import require
from tenfold.pipeline import compress
from tenfold.profiling import environment
from tenfold.runtime import Runtime

HERE = Path(__file__).parent


def main() -> None:
    """Run every case in a process of its own and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "wide_head.yaml")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "wide_head.json")
    parser.add_argument("--only", help="run this case alone")
    parser.add_argument("--profile", action="store_true", help="show where the time goes")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    options = parser.parse_args()
    config = yaml.safe_load(options.config.read_text())
    if options.here:
        print(json.dumps(run(config, options.here, profiled=options.profile)))
        return
    found: dict[str, Any] = {}
    for name in config["cases"] if options.only is None else [options.only]:
        words = [sys.executable, "-m", "benchmarks.wide_head.run", "--config", str(options.config), "--here", name]
        words += ["--profile"] * options.profile
        lines = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        found[name] = json.loads(lines[-1])
        print(name, *lines[:-1], json.dumps(found[name]), sep="\n", flush=True)
    result = {"benchmark": "wide_head", "config": config, "cases": found}
    result["environment"] = json.loads(environment().to_json())
    if not options.profile:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    missed = [name for name, own in found.items() if any(own[key] > most for key, most in config["bounds"].items())]
    raise SystemExit(f"over the bounds: {', '.join(missed)}" if missed else 0)


def run(config: dict[str, Any], name: str, *, profiled: bool) -> dict[str, Any]:
    """Return what one case costs, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(config["seed"])
    case = config["cases"][name]
    model = network(case["network"], config).eval()
    batches = [torch.randint(0, config["vocabulary"], (1, config["tokens"])) for _ in range(config["batches"])]
    with torch.no_grad():
        model(batches[0])
    own = _peak_mib()
    profiler = cProfile.Profile(time.process_time) if profiled else None
    start, wall = time.process_time(), time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # weights are random: the result agrees in little
        if profiler is not None:
            profiler.enable()
        small = compress(model, batches[0], case["recipe"], data=batches, runtime=Runtime(measure=False))
        if profiler is not None:
            profiler.disable()
    cpu, wall = time.process_time() - start, time.perf_counter() - wall
    if profiler is not None:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(30)
    record = small.record
    factorized = {layer.path: layer.rank for layer in small.plan.factorized}
    if "head" in case and case["head"] not in factorized:
        msg = f"{name}: the head is not factorized, so that nothing was measured"
        raise SystemExit(msg)
    return {
        "cpu_s": round(cpu, 2),
        "wall_s": round(wall, 2),
        "model_mib": own,
        "above_mib": round(_peak_mib() - own, 1),
        "steps_s": {step: round(seconds, 2) for step, seconds in record.seconds.items()},
        "params": [record.before.params, record.after.params],
        "relative_error": None if record.agreement is None else record.agreement.relative_error,
        "factorized": factorized,
    }


def network(kind: str, config: dict[str, Any]) -> nn.Module:
    """Return a network with random weights."""
    if kind == "mlp":
        return Words(config["vocabulary"], config["width"], config["blocks"])
    supply_torchvision_ops()  # transformers imports torchvision, which may not match torch
    transformers = require("transformers", "hf")
    tied = kind.endswith("-tied")
    shape = {"vocab_size": config["vocabulary"], "n_embd": config["width"], "n_layer": config["blocks"]}
    wanted = transformers.GPT2Config(**shape, n_head=12, tie_word_embeddings=tied, use_cache=False)
    return transformers.GPT2LMHeadModel(wanted)


class Words(nn.Module):
    """Words that are looked up, go through two-layer blocks with shortcuts, and become scores of words."""

    def __init__(self, vocabulary: int, width: int, blocks: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the scores (batch, tokens, vocabulary)."""
        x = self.words(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


def _peak_mib() -> float:
    """Return the largest resident set of this process so far, in MiB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)  # KiB on Linux


if __name__ == "__main__":
    main()
