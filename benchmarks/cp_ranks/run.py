"""How long it takes to find the smallest CP rank of every inner convolution of a network, at a relative error.

    python -m benchmarks.cp_ranks.run [--config FILE] [--out FOLDER]

Two processes with one thread each. A second search from the table that the first one wrote, and a first one that is
interrupted half way, must find the same ranks.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.latency.run import decay_
from benchmarks.zoo import build
from tenfold.parallel import Workers
from tenfold.planning import plan
from tenfold.profiling import environment, profile
from tenfold.records import Recipe
from tenfold.runtime import Event, Runtime
from tenfold.surgery import apply

HERE = Path(__file__).parent


def main() -> None:
    """Search, search again, apply; write JSON and a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "cp_ranks.yaml")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results")
    options = parser.parse_args()
    config = yaml.safe_load(options.config.read_text())
    torch.set_num_threads(1)
    subject = build(config["model"], size=64, seed=config["seed"])
    decay_(subject.model, config["decay"])
    before = profile(subject.model, subject.inputs)
    start = time.perf_counter()

    def show(event: Event) -> None:
        print(f"{event.done} of {event.total} after {time.perf_counter() - start:.1f} s", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        rule = {"name": "error", "rel_error": config["rel_error"], "seed": config["seed"]}
        recipe = Recipe(rule=rule, formats=config["format"])
        runtime = Runtime(workers=Workers(config["jobs"]), cache=Path(folder) / "table.json", on_event=show)
        made = plan(subject.model, before, recipe, runtime=runtime)
        seconds, cpu = time.perf_counter() - start, cpu_seconds()
        start = time.perf_counter()
        again = plan(subject.model, before, recipe, runtime=runtime)
        second = time.perf_counter() - start
    small = apply(subject.model, made)
    result: dict[str, Any] = {
        "benchmark": "cp_ranks",
        "config": config,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "again_seconds": second,
        "same_again": again == made,
        "layers": [],
        "environment": json.loads(environment(torch.device("cpu")).to_json()),
    }
    for layer in made.layers:
        if layer.action == "factorize":
            found = small.get_submodule(layer.path)
            share = layer.after.params / layer.before.params
            result["layers"].append(
                {"path": layer.path, "rank": layer.rank, "params": share, "final_error": found.fit.rel_error}
            )
        elif "x3" in layer.kind or "3x3" in layer.kind:
            result["layers"].append({"path": layer.path, "kept": layer.reason})
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "cp_ranks.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.out / "cp_ranks.md").write_text(table(result))
    print(table(result))


def cpu_seconds() -> float:
    """Return the processor seconds of this process and of those of its workers that have ended."""
    own, others = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(r.ru_utime + r.ru_stime for r in (own, others))


def table(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    env, config = result["environment"], result["config"]
    lines = [
        "# Smallest CP ranks of a network",
        "",
        (
            f"`python -m benchmarks.cp_ranks.run` on {env['device_name'] or env['device']}, torch {env['torch']}: "
            f"{config['model']}, random weights with spectra that fall as k^-{config['decay']}, rule `error` with "
            f"rel_error {config['rel_error']} and {config['format']}, {config['jobs']} processes with one thread each. "
            f"{result['seconds']:.0f} s; again from the table {result['again_seconds']:.1f} s, "
            f"{'the same plan' if result['same_again'] else 'ANOTHER PLAN'}. *Error*: of the final fits, which take "
            "more sweeps than the search."
        ),
        "",
        "| layer | rank | parameters | error |",
        "| --- | ---: | ---: | ---: |",
    ]
    for layer in result["layers"]:
        if "rank" in layer:
            rank = ", ".join(str(r) for r in layer["rank"].values())
            lines.append(f"| {layer['path']} | {rank} | {layer['params']:.1%} | {layer['final_error']:.4f} |")
        else:
            lines.append(f"| {layer['path']} | kept | | {layer['kept']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
