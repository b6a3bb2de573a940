"""Measure what planning costs with every format: processor time for each format, on each distinct layer of a network.

    python -m benchmarks.planning.by_format [--network NAME] [--formats LIST] [--beside FOLDER] [--out FILE]
                                            [--threads N] [--most SECONDS] [--whole]

Each kind of layer is planned alone and counts as often as the network has it. ``--beside`` is another source tree of
tenfold, which takes turns with this one in a process of its own. What exceeds ``--most`` seconds is stopped and counts
as that much: ratios are then too small, or too large where it is this tree. ``--whole`` plans the whole network with
all formats at once.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tenfold.errors import BudgetError

HERE = Path(__file__).parent
BUDGET = {"macs": 0.5}

FIELDS = ("in_channels", "out_channels", "kernel", "stride", "padding")


def main() -> None:
    """Measure this tree and the one beside it, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="torchvision:resnet50")
    parser.add_argument("--formats", help="names with commas between them; all of them if left out")
    parser.add_argument("--beside", type=Path, help="another source tree, to be measured in turns with this one")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "planning_by_format.json")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--most", type=float, default=120.0)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.worker:
        signal.signal(signal.SIGPROF, _stop)
        for line in sys.stdin:
            print(seconds_within(options.most, json.loads(line)), flush=True)
        return
    compare(options)


def compare(options: argparse.Namespace) -> None:
    """Time each format on each kind of layer in both trees; write after each, for a run may take long."""
    from benchmarks.zoo import build
    from tenfold.formats import FORMATS
    from tenfold.profiling import environment, profile

    subject = build(options.network)
    wanted = profile(subject.model, subject.inputs)
    formats = options.formats.split(",") if options.formats else FORMATS.names()
    trees = {"this": HERE.parent.parent} | ({} if options.beside is None else {"beside": options.beside.resolve()})
    kinds: Counter[Any] = Counter((layer.spec, layer.calls) for layer in wanted.layers if layer.spec is not None)
    workers = {name: worker(folder, options.threads, options.most) for name, folder in trees.items()}
    served = {
        (name, kind): count
        for name in formats
        for kind, count in kinds.items()
        if FORMATS.get(name).unsupported_reason(kind[0]) is None
    }
    result: dict[str, Any] = {"benchmark": "planning_by_format", "network": options.network, "most": options.most}
    result |= {"threads": options.threads, "environment": json.loads(environment().to_json()), "rows": []}
    for (name, (spec, calls)), count in served.items():
        work = {"layer": [getattr(spec, field) for field in FIELDS], "in_shape": calls[0].in_shape, "format": name}
        row: dict[str, Any] = {"format": name, "layer": str(spec), "count": count}
        for tree in trees:
            row[tree] = ask(workers[tree], work)
        result["rows"].append(row)
        print(row, flush=True)
        result["seconds"] = totals(result["rows"], list(trees))
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    if options.whole:
        result["whole"] = seconds_of_network(subject.model, wanted, formats)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: result[k] for k in ("seconds", "whole") if k in result}, indent=1))


def totals(rows: list[dict[str, Any]], trees: list[str]) -> dict[str, dict[str, float]]:
    """Return for each format and for all the seconds of the whole network in each tree, and their ratio."""
    found: dict[str, dict[str, float]] = {}
    for name in [*dict.fromkeys(row["format"] for row in rows), "all"]:
        own = [row for row in rows if name in ("all", row["format"])]
        found[name] = {tree: round(sum(row["count"] * row[tree] for row in own), 3) for tree in trees}
        if len(trees) > 1:
            found[name]["beside / this"] = round(found[name]["beside"] / max(found[name]["this"], 1e-3), 2)
    return found


def worker(tree: Path, threads: int, most: float) -> subprocess.Popen[str]:
    """Return a process that answers with seconds whatever layer and format it is asked for, in a source tree."""
    words = [sys.executable, str(Path(__file__)), "--worker", "--threads", str(threads), "--most", str(most)]
    environ = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(words, env=environ, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def ask(process: subprocess.Popen[str], work: dict[str, Any]) -> float:
    """Return the seconds that a worker answers."""
    if process.stdin is None or process.stdout is None:
        raise TypeError
    print(json.dumps(work), file=process.stdin, flush=True)
    return float(process.stdout.readline())


def seconds_within(most: float, work: dict[str, Any]) -> float:
    """Return the seconds for a layer and format, ``most`` if it takes longer."""
    seconds_of_layer(**{**work, "layer": [8, 8, [], [], []], "in_shape": [1, 8], "format": "low_rank"})  # warm up
    signal.setitimer(signal.ITIMER_PROF, most)
    try:
        return seconds_of_layer(**work)
    except TimeoutError:
        return most
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _stop(*_: object) -> None:
    raise TimeoutError


def seconds_of_layer(layer: list[Any], in_shape: list[int], format: str) -> float:
    """Return the processor time to plan for one layer, in the tree that Python finds."""
    from tenfold.profiling import profile

    model = nn.Sequential(_layer(*layer))
    wanted = profile(model, torch.zeros(in_shape))
    return seconds_of_network(model, wanted, [format], keep_ends=False)


def seconds_of_network(model: nn.Module, wanted: Any, formats: Any, *, keep_ends: bool | None = None) -> float:
    """Return the processor time to plan for a profiled network, by what the tree has for it."""
    start = time.process_time()
    try:
        from tenfold.allocation import choose
        from tenfold.planning import tabulate
        from tenfold.records import Recipe
    except ImportError:  # the tree before recipes
        _plan_as_before(model, wanted, formats, keep_ends)
        return round(time.process_time() - start, 4)
    start = time.process_time()
    recipe = Recipe(budget=BUDGET, formats=tuple(formats), keep_ends=keep_ends)
    table = tabulate(model, wanted, recipe)
    with suppress(BudgetError):  # one layer in one format may not come so low
        choose(table, recipe)
    return round(time.process_time() - start, 4)


def _plan_as_before(model: nn.Module, wanted: Any, formats: Any, keep_ends: bool | None) -> None:
    import importlib

    rule = importlib.import_module("tenfold.ranks").rule_from("global")
    plan: Any = importlib.import_module("tenfold.planning").plan
    with suppress(BudgetError):
        plan(model, wanted, rule=rule, formats=tuple(formats), budget=BUDGET, keep_ends=keep_ends)


def _layer(inner: int, outer: int, kernel: list[int], stride: list[int], padding: list[int]) -> nn.Module:
    """Return a layer whose singular values fall, as those of trained layers do."""
    torch.manual_seed(0)
    plain = not kernel
    made = nn.Linear(inner, outer) if plain else nn.Conv2d(inner, outer, kernel, stride, padding, bias=False)
    weight = made.weight
    u, s, v = torch.linalg.svd(weight.detach().double().flatten(1), full_matrices=False)
    fall = torch.arange(1, len(s) + 1).double() ** -0.5
    with torch.no_grad():
        weight.copy_((u @ torch.diag(s[0] * fall) @ v).view_as(weight))
    return made


if __name__ == "__main__":
    main()
