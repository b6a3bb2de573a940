"""tenfold eval: how good a model is."""

from __future__ import annotations

import time
from enum import StrEnum
from typing import Annotated

import typer

from tenfold.cli.options import Machine, Source
from tenfold.cli.terminal import Terminal

ORDER = 50


class Split(StrEnum):
    """The parts of the data that a score can be of."""

    test = "test"
    validation = "validation"


On = Annotated[Split, typer.Option("--split", help="The test set, or the part held out of the training set.")]
Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help="At most so many samples, a fixed choice.")]
Batch = Annotated[int, typer.Option("--batch", min=1, metavar="N", help="Samples per forward.")]


def run(
    source: Source,
    machine: Machine,
    terminal: Terminal,
    split: On = Split.test,
    limit: Limit = None,
    batch: Batch = 125,
) -> None:
    """Score a model, dense (--weights) or compressed (--checkpoint), on its test set.

    tenfold eval --task cifar10:resnet56 --weights resnet56.safetensors

    With --json, one object: `task`, `split`, `score` (a fraction), `params`, `macs`, `bytes`, `seconds`, `environment`.
    """
    with terminal.session():
        from tenfold.cli.sources import open_source
        from tenfold.profiling import profile
        from tenfold.reporting.numbers import count, percent

        terminal.step("open the model")
        opened = open_source(source, machine)
        cost = profile(opened.model, opened.inputs())
        terminal.step("evaluate")
        start = time.perf_counter()
        score = opened.task.evaluate(opened.model, split=split.value, limit=limit, batch_size=batch)
        seconds = time.perf_counter() - start
        what = f"{opened.task.id}, {split.value} set"
        terminal.say(f"{what}: {percent(score)}, {count(cost.params)} parameters, {count(cost.macs)} MACs")
        terminal.result(
            {
                "task": opened.name,
                "split": split.value,
                "limit": limit,
                "score": score,
                "params": cost.params,
                "macs": cost.macs,
                "bytes": cost.bytes,
                "seconds": {"evaluate": seconds},
                "environment": cost.environment.model_dump(mode="json"),
            }
        )
