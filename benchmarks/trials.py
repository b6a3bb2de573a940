"""What benchmarks share that train variants with seeds: options, finished runs, and the result of them all."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from tenfold.profiling import environment
from tenfold.records import TuneConfig, TuneResult, write_text
from tenfold.tasks import Task, load_task
from tenfold.training import TrainingFolder, finetune

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Trials:
    """A benchmark of trainings, by its name and what was asked for on the command line.

    Attributes:
        name: of the benchmark, its folder of runs and its results.
        options: as parsed.
        config: the YAML file; ``seeds`` are in it, and ``variants`` where there are several.
    """

    name: str
    options: argparse.Namespace
    config: Row

    @classmethod
    def read(cls, name: str, about: str | None, here: Path, **flags: str) -> Trials:
        """Return what the command line asks for; ``flags`` are options of this benchmark alone, with their help."""
        parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--config", type=Path, default=here / f"{name}.yaml")
        parser.add_argument("--data", type=Path)
        parser.add_argument("--weights", type=Path, help="a file or folder of trained weights, where it needs one")
        parser.add_argument("--runs", type=Path, default=Path("runs") / name)
        parser.add_argument("--only", action="append", help="a variant; may be repeated")
        parser.add_argument("--seed", type=int, action="append")
        parser.add_argument("--report", action="store_true", help="train nothing, write what there is")
        parser.add_argument("--threads", type=int, default=1)
        parser.add_argument("--out", type=Path, default=RESULTS)
        for flag, text in flags.items():
            parser.add_argument(f"--{flag}", action="store_true", help=text)
        options = parser.parse_args()
        torch.set_num_threads(options.threads)
        return cls(name, options, yaml.safe_load(options.config.read_text()))

    def wanted(self) -> Iterator[tuple[str, int]]:
        """Yield variant and seed of what is to be trained now."""
        for seed in () if self.options.report else self.options.seed or self.config["seeds"]:
            for variant in self.options.only or self.config.get("variants", ["seed"]):
                yield variant, seed

    def train(self, task: str, trained: Callable[[Task, Row, Path], Row]) -> None:
        """Show the row of each run of TASK:VARIANT that is wanted, trained now where it is not finished."""
        for variant, seed in self.wanted():
            found = load_task(f"{task}:{variant}", data=self.options.data, seed=seed)
            folder = self.folder(variant, seed)
            print(json.dumps(finished(folder, partial(trained, found, self.config, folder))), flush=True)

    def folder(self, variant: str, seed: int) -> Path:
        """Return where a run is kept."""
        runs: Path = self.options.runs
        return runs / f"{variant}-{seed}"

    def write(self, table: Callable[[Row], str], **more: Any) -> None:
        """Write all finished runs as JSON and as the Markdown page that ``table`` makes of them, and show that."""
        variants = self.config.get("variants", ["seed"])
        files = [self.folder(v, seed) / "run.json" for v in variants for seed in self.config["seeds"]]
        rows = [json.loads(file.read_text()) for file in files if file.is_file()]
        result = {"benchmark": self.name, "config": self.config, "runs": rows, **more}
        result["environment"] = environment(torch.device("cpu")).model_dump(mode="json")
        write_text(self.options.out / f"{self.name}.json", json.dumps(result, indent=1) + "\n")
        page = table(result)
        write_text(self.options.out / f"{self.name}.md", page)
        print(page)


def tuned(
    task: Task, config: TuneConfig, folder: Path, identity: str, *, scored: bool = True
) -> tuple[Any, TuneResult]:
    """Return the network of a task, trained from its initial weights without the validation part, and its history.

    Args:
        task: with its data.
        config: of the training.
        folder: of the run, in which every epoch is kept.
        identity: what the outcome depends on besides.
        scored: whether each epoch is scored on the validation part.
    """
    model = task.build()
    result = finetune(
        model,
        partial(task.train_batches, batch_size=config.batch_size, seed=task.seed, hold_out=True),
        config,
        loss=task.loss(),
        evaluate=partial(task.evaluate, split="validation") if scored else None,
        folder=TrainingFolder(folder / "epochs", identity),
    )
    return model, result


def curve_of(result: TuneResult) -> list[Row]:
    """Return the epochs of a training: number, loss, score and seconds."""
    return [epoch.model_dump(include={"epoch", "loss", "score", "seconds"}) for epoch in result.history]


def spread(values: Sequence[float], digits: int = 4, unit: str = "") -> str:
    """Return mean and standard deviation over seeds, for a table.

    Example:
        >>> spread([0.5, 0.7], 2), spread([66.6], 1, " %")
        ('0.60 ± 0.14', '66.6 %')
    """
    mean = f"{statistics.mean(values):.{digits}f}{unit}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def finished(folder: Path, train: Callable[[], Row]) -> Row:
    """Return the row of a run: from its folder where it was finished before, else trained now and kept there."""
    done = folder / "run.json"
    if not done.is_file():
        write_text(done, json.dumps(train()) + "\n")
    row: Row = json.loads(done.read_text())
    return row
