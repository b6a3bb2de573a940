"""Compress a language model without training, by tenfold and by the methods of the field, and score its perplexity.

    python -m benchmarks.language.run --model FOLDER --texts FOLDER [--sst FILE] [--only METHOD] [--threads N]

FOLDER of the texts holds ``train.txt`` and ``test.txt``, a text a line; FILE is ``stsa.fine.test`` of the Stanford
Sentiment Treebank. Every row is kept in the folder of ``--runs`` when it is done, and not made again; nor are rows of
``--out`` that were made by the same protocol. ``--report`` writes the table of what there is.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from benchmarks.language.lems import lems
from benchmarks.language.modegpt import modegpt
from benchmarks.language.ours import ours
from benchmarks.language.pairs import uniform
from benchmarks.language.protocol import Protocol
from benchmarks.language.report import write
from benchmarks.zoo import supply_torchvision_ops
from tenfold.records import write_text
from tenfold.tasks.causal_lm import CausalLM

RESULTS = Path(__file__).parent.parent / "results"
Row = dict[str, Any]
At = Callable[[float], nn.Module]

RIVALS: dict[str, Callable[[Protocol], At]] = {
    "plain": lambda protocol: uniform(protocol, "plain"),
    "whitened": lambda protocol: uniform(protocol, "whitened"),
    "kfac": lambda protocol: uniform(protocol, "kfac"),
    "lems": lems,
    "modegpt": modegpt,
}


def main() -> None:
    """Make the rows that are missing and write JSON and a Markdown table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(__file__).parent / "language.yaml")
    parser.add_argument("--model", required=True, help="a folder or id of transformers, or a file in GGUF")
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--sst", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/language"))
    parser.add_argument("--only", action="append", help="a method of the YAML file; may be repeated")
    parser.add_argument("--share", type=float, action="append")
    parser.add_argument("--report", action="store_true", help="make no row, write what there is")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    supply_torchvision_ops()
    config = yaml.safe_load(options.config.read_text())
    task = CausalLM(f"{options.model}@{config['sequence']}", data=options.texts)
    rows = Rows(Protocol(task, config, options.sst, options.runs), options.runs)
    rows.take(options.out / "language.json")
    if not options.report:
        rows.make(options.only or list(config["methods"]), options.share or config["shares"])
    write(rows.finished(), config, options.out)


class Rows:
    """Rows in files, one by one, each with all that it depends on."""

    def __init__(self, protocol: Protocol, runs: Path) -> None:
        self.protocol, self.runs, self.config = protocol, runs, protocol.config
        names = ("seed", "sequence", "calibration", "kl", "test", "elsewhere")
        self.key = {name: self.config[name] for name in names} | {"sst": protocol.sst is not None}

    def take(self, results: Path) -> None:
        """Take rows from an earlier result, where there are none yet; others than of this protocol are left alone."""
        for row in json.loads(results.read_text())["runs"] if results.is_file() else []:
            file = self._file(row["method"], row["share"])
            if row["key"] == self.key and not file.is_file():
                write_text(file, json.dumps(row) + "\n")

    def make(self, methods: list[str], shares: list[float]) -> None:
        """Make what is missing; the dense model first, which tells how long a row takes."""
        start = time.perf_counter()
        dense = self._row("dense", {}, 1.0, lambda _: self.protocol.model)
        missing = [(m, s) for m in methods for s in shares if not self._is_done(m, self.config["methods"][m], s)]
        seconds = dense["seconds"]["scores"]
        print(f"{len(missing)} rows to make, {seconds:.0f} s each for the scores alone", flush=True)
        for method in dict.fromkeys(method for method, _ in missing):
            settings = self.config["methods"][method]
            start = time.perf_counter()
            at = (
                ours(self.protocol, settings["recipe"])
                if "recipe" in settings
                else RIVALS[settings["rival"]](self.protocol)
            )
            ready = time.perf_counter() - start
            for share in (s for m, s in missing if m == method):
                self._row(method, settings, share, at, ready)
            del at
            gc.collect()

    def _row(self, method: str, settings: Row, share: float, at: At, ready: float = 0.0) -> Row:
        """Return a row, from its file where it is finished."""
        file = self._file(method, share)
        if self._is_done(method, settings, share):
            found: Row = json.loads(file.read_text())
            return found
        start = time.perf_counter()
        model = at(share)
        made = time.perf_counter() - start
        start = time.perf_counter()
        scores = self.protocol.scores(model)
        seconds = {"prepare": ready, "make": made, "scores": time.perf_counter() - start}
        row = {"method": method, "settings": settings, "share": share, "kept": self._kept(model), "scores": scores}
        row |= {"seconds": seconds, "key": self.key}
        write_text(file, json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
        return row

    def finished(self) -> list[Row]:
        """Return all rows of this protocol that there are, in the order of the YAML file."""
        wanted = [("dense", {}, 1.0)]
        wanted += [(m, settings, s) for m, settings in self.config["methods"].items() for s in self.config["shares"]]
        return [json.loads(self._file(m, s).read_text()) for m, own, s in wanted if self._is_done(m, own, s)]

    def _is_done(self, method: str, settings: Row, share: float) -> bool:
        file = self._file(method, share)
        known = json.loads(file.read_text()) if file.is_file() else {}
        return bool(known) and known["key"] == self.key and known["settings"] == settings

    def _file(self, method: str, share: float) -> Path:
        name = re.sub(r"\W+", "-", f"{method} {share}").strip("-")
        return self.runs / f"{name}.json"

    def _kept(self, model: nn.Module) -> float:
        """Return which share of the numbers in the linear layers a model has."""
        rest = sum(p.numel() for p in self.protocol.model.parameters()) - self.protocol.linear_params
        whole = sum(p.numel() for p in model.parameters())
        emulated = [m for m in model.modules() if hasattr(m, "counted")]
        whole -= sum(int(m.weight.numel() - m.counted) for m in emulated)  # type: ignore[operator, union-attr]
        return (whole - rest) / self.protocol.linear_params


if __name__ == "__main__":
    main()
