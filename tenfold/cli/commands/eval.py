"""tenfold eval: how good a model is."""

from __future__ import annotations

import time
from typing import Literal

from pydantic import PositiveInt

from tenfold.cli.source import Machine, Source
from tenfold.cli.terminal import Terminal
from tenfold.records import Seed

ORDER = 50


def run(
    source: Source,
    machine: Machine,
    terminal: Terminal,
    *,
    split: Literal["test", "validation"] = "test",
    limit: PositiveInt | None = None,
    batch_size: PositiveInt = 125,
    seed: Seed = 0,
) -> None:
    """Score a model, dense (--weights) or compressed (--checkpoint), on its test set.

    tenfold eval --task cifar10:resnet56 --weights resnet56.safetensors

    With --json, one object: `task`, `split`, `score` (a fraction), `params`, `macs`, `bytes`, `seconds`, `environment`.

    Args:
        source: the model.
        machine: where to run it.
        terminal: what to show.
        split: the test set, or the part held out of the training set.
        limit: at most so many samples, a fixed choice.
        batch_size: samples per forward.
        seed: of the task.
    """
    from tenfold.cli.source import open_source
    from tenfold.profiling import profile
    from tenfold.reporting.numbers import count, percent

    terminal.step("open the model")
    opened = open_source(source, machine, seed)
    cost = profile(opened.model, opened.inputs())
    terminal.step("evaluate")
    start = time.perf_counter()
    score = opened.task.evaluate(opened.model, split=split, limit=limit, batch_size=batch_size)
    seconds = time.perf_counter() - start
    terminal.say(
        f"{opened.task.id}, {split} set: {percent(score)}, {count(cost.params)} parameters, {count(cost.macs)} MACs"
    )
    terminal.result(
        {
            "task": opened.name,
            "split": split,
            "limit": limit,
            "score": score,
            "params": cost.params,
            "macs": cost.macs,
            "bytes": cost.bytes,
            "seconds": {"evaluate": seconds},
            "environment": cost.environment.model_dump(mode="json"),
        }
    )
