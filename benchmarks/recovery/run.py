"""CIFAR-10 after recovery: compress in one of many ways, train on, keep the checkpoint.

    python -m benchmarks.recovery.run --weights-dir FOLDER [--config FILE] [--only ROW] [--work FOLDER] [--threads N]

Weights are ``FOLDER/NETWORK.safetensors``. A row of several seeds is several runs, ``ROW/SEED``. A run that was killed
goes on after its last complete epoch, from ``--work``; runs that are in the result already are not repeated. Writes
``benchmarks/results/CONFIG.json`` and ``.md`` after each run, and the checkpoint of a row that names one (of
its first seed) to ``benchmarks/checkpoints``.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import yaml
from torch import nn

import tenfold
from benchmarks.recovery.methods import WAYS, Work, compressed, one_shot
from tenfold.errors import TuningError
from tenfold.pipeline import measurement
from tenfold.planning import analyse
from tenfold.profiling import environment, profile
from tenfold.records import Plan, Profile, RunRecord, locked, write_text
from tenfold.tasks import load_task
from tenfold.tasks.base import Task
from tenfold.training import CachedLogits, Distillation, EpochRecord, TuneConfig

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
CHECKPOINTS = HERE.parent / "checkpoints"


def main() -> None:
    """Make the rows that are missing, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights-dir", type=Path, required=True, help="folder with NETWORK.safetensors")
    parser.add_argument("--config", type=Path, default=HERE / "recovery.yaml")
    parser.add_argument("--only", action="append", help="run only these rows")
    parser.add_argument("--work", type=Path, default=Path("runs/recovery"), help="where epochs and answers are kept")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = yaml.safe_load(options.config.read_text())
    target = RESULTS / f"{options.config.stem}.json"
    for name, own in runs(config):
        if (options.only and name.split("/")[0] not in options.only) or name in read(target).get("rows", {}):
            continue
        row = Row(name, own, options.weights_dir, options.work / options.config.stem)
        add(target, config, name, row.run())


def runs(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and configuration of all runs: one for each seed of each row, all rows at one seed first."""
    rows = {name: merged(config["defaults"], own) for name, own in config["rows"].items()}
    for seed in sorted({seed for row in rows.values() for seed in row["seeds"]}):
        for name, row in rows.items():
            if seed in row["seeds"]:
                yield (name if len(row["seeds"]) == 1 else f"{name}/{seed}"), row | {"seed": seed}


def merged(defaults: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return a row with what it leaves out; of its recipe, too. A recipe of null is the dense network, trained on."""
    recipe = own.get("recipe", {})
    return defaults | own | {"recipe": None if recipe is None else defaults["recipe"] | recipe}


class Row:
    """One network, made small and trained on as the configuration says."""

    def __init__(self, name: str, config: dict[str, Any], weights_dir: Path, work: Path) -> None:
        self.name, self.config, self.weights_dir, self.work = name, config, weights_dir, work
        self.seed = int(config["seed"])
        self.task: Task = load_task(f"cifar10:{config['network']}", seed=self.seed)
        self.model = self.dense(config["network"])

    def dense(self, network: str) -> nn.Module:
        """Return a trained network in the memory format in which it runs fastest."""
        task = load_task(f"cifar10:{network}", seed=self.seed)
        model: nn.Module = task.dense(self.weights_dir / f"{network}.safetensors")
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def run(self) -> dict[str, Any]:
        """Return what came of the row."""
        start = time.perf_counter()
        scores = {"dense": self.task.evaluate(self.model)}
        way = self.config.get("method", {"name": "one-shot"})["name"]
        work = self.job()
        try:
            found = one_shot(work, self.start(work)) if way == "one-shot" else WAYS[way](work)
        except TuningError as error:  # the loss or the weights are no longer finite
            print(self.name, error, flush=True)
            model, _ = self.start(work)
            scores["compressed"] = self.task.evaluate(model)
            return self.outcome(profile(model, self.task.example_inputs()), scores, (), diverged=True)
        scores |= {**found.scores, "tuned": self.task.evaluate(found.model)}
        print(self.name, {k: round(100 * v, 2) for k, v in scores.items()}, flush=True)
        after = profile(found.model, self.task.example_inputs())
        if found.plan is not None and self.config.get("checkpoint") and self.seed == self.config["seeds"][0]:
            row = self.name.partition("/")[0]
            record = RunRecord(
                seed=self.seed,
                before=measurement(self.cost, score=scores["dense"]),
                after=measurement(after, score=scores["tuned"]),
                scores=scores,
                plan=found.plan,
                tuning=tuple(epoch.model_dump() for epoch in found.epochs),
                seconds={"all": time.perf_counter() - start},
                environment=environment(torch.device("cpu")),
                task=self.task.id,
                command=f"python -m benchmarks.recovery.run --only {row} --weights-dir FOLDER",
            )
            spectra = analyse(self.model, self.cost, found.plan, fits=True)
            tenfold.save(
                found.model, found.plan, CHECKPOINTS / self.config["checkpoint"], record=record, analysis=spectra
            )
        return self.outcome(after, scores, found.epochs)

    @cached_property
    def cost(self) -> Profile:
        """What the trained network costs."""
        return profile(self.model, self.task.example_inputs())

    def outcome(
        self, after: Profile, scores: dict[str, float], epochs: tuple[EpochRecord, ...], *, diverged: bool = False
    ) -> dict[str, Any]:
        """Return what goes into the result."""
        return {
            "network": self.config["network"],
            "macs": after.macs / self.cost.macs,
            "params": after.params / self.cost.params,
            **scores,
            "diverged": diverged,
            "config": self.config,
            "history": [epoch.model_dump() for epoch in epochs],
        }

    def start(self, work: Work) -> tuple[nn.Module, Plan | None]:
        """Return the network as it goes into training: fitted by data, from a checkpoint, or dense as a control."""
        if self.config.get("start"):  # goes on where another run ended
            return tenfold.load(copy.deepcopy(self.model), CHECKPOINTS / self.config["start"])
        if self.config["recipe"] is None:
            return copy.deepcopy(self.model), None
        return compressed(work)

    def job(self) -> Work:
        """Return all that a way needs to know."""
        config = TuneConfig(seed=self.seed, **self.config["train"])
        batches, loss = self.taught(config)
        folder = self.work / self.name
        return Work(
            self.task, self.model, self.config, self.seed, folder, self.name, config, batches, loss, self.report
        )

    def taught(self, config: TuneConfig) -> tuple[Callable[[int], Any], Distillation | None]:
        """Return batches and loss: with the stored answers of the teachers, or with labels alone."""

        def batches(epoch: int) -> Any:
            return self.task.train_batches(epoch, batch_size=config.batch_size, seed=0)

        def unlabeled(epoch: int) -> Any:
            size, samples = config.batch_size, self.config["samples"]
            return self.task.unlabeled_batches(epoch, samples, batch_size=size, seed=self.seed)

        taught = self.config["distillation"]
        if taught is None:
            return batches, None
        if taught == "label-free":
            return unlabeled, Distillation(self.model, share=1.0)
        teachers = [self.dense(name) for name in taught["teachers"]]
        views, about = taught["views"], f"cifar10 train, batches of {config.batch_size}, seed 0"
        answers = CachedLogits(teachers, batches, self.work.parent / "answers", views=views, about=about)
        loss = Distillation(None, share=taught["share"], temperature=taught["temperature"])
        return lambda epoch: answers(epoch + self.seed), loss  # seeds share the answers; each begins at another view

    def report(self, epoch: EpochRecord) -> None:
        """Say that an epoch is complete."""
        print(f"{self.name} epoch {epoch.epoch}: loss {epoch.loss:.4f}, {epoch.seconds:.0f} s", flush=True)


def read(target: Path) -> dict[str, Any]:
    """Return the result so far."""
    found: dict[str, Any] = json.loads(target.read_text()) if target.is_file() else {}
    return found


def add(target: Path, config: dict[str, Any], name: str, row: dict[str, Any]) -> None:
    """Add a row to the result; other processes may be adding theirs."""
    with locked(target):
        result = {"benchmark": "recovery", "rows": {}} | read(target)
        result["rows"][name] = row
        result["environment"] = json.loads(environment().to_json())
        write_text(target, json.dumps(result, indent=1) + "\n")
        write_text(target.with_suffix(".md"), table(config, result, target.stem))


def table(config: dict[str, Any], result: dict[str, Any], stem: str) -> str:
    """Return all rows as Markdown."""
    env = result["environment"]
    lines = [f"# {config['title']}", "", config["text"].strip(), ""]
    lines += ["| row | network | MACs | params | dense | compressed | tuned | epochs | runs |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for name in config["rows"]:
        found = [row for key, row in result["rows"].items() if key.split("/")[0] == name]
        if found:
            lines.append(f"| {name} | {found[0]['network']} | {' | '.join(cells(found))} |")
    missing = [name for name, _ in runs(config) if name not in result["rows"]]
    if missing:
        lines += ["", f"Not run yet: {', '.join(missing)}."]
    lines += ["", f"On {env['device_name'] or env['device']}, torch {env['torch']}, Python {env['python']}."]
    file = f"--config benchmarks/recovery/{stem}.yaml "
    lines += ["", f"`python -m benchmarks.recovery.run {file}--weights-dir FOLDER [--only ROW]`"]
    return "\n".join(lines) + "\n"


def cells(found: list[dict[str, Any]]) -> list[str]:
    """Return shares, scores and epochs of the runs of a row: means, with the standard deviation of several."""
    shares = [f"{100 * mean(row[key] for row in found):.1f} %" for key in ("macs", "params")]
    scores = []
    for key in ("dense", "compressed", "tuned"):
        values = [100 * row[key] for row in found if key in row]
        spread = f" ± {stdev(values):.2f}" if len(values) > 1 and key != "dense" else ""
        scores.append(f"{mean(values):.2f}{spread}" if values else "diverged")
    lost = sum(row["diverged"] for row in found)
    return [*shares, *scores, str(len(found[0]["history"])), f"{len(found)}{f', {lost} diverged' if lost else ''}"]


if __name__ == "__main__":
    main()
