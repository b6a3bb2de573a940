"""tenfold eval: how good a model is."""

from __future__ import annotations

import time
from functools import partial
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

    With --json, one object: `task`, `split`, `score`, `metric` (name, unit, direction; a fraction unless the task says
    otherwise), `params`, `macs`, `bytes`, `seconds`, `environment`.

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
    from tenfold.planning import Score
    from tenfold.profiling import profile
    from tenfold.records.metric import FRACTION
    from tenfold.reporting import numbers
    from tenfold.runtime import Runtime

    terminal.step("open the model")
    opened = open_source(source, machine, seed)
    cost = profile(opened.model, opened.inputs())
    terminal.step("evaluate")
    start = time.perf_counter()
    task = opened.task
    count = Runtime(on_event=terminal.on_event).counter("evaluate")
    evaluate = partial(task.evaluate, split=split, limit=limit, batch_size=batch_size, progress=count)
    score = Score(evaluate, metric=task.metric).of_original(opened.model)
    seconds = time.perf_counter() - start
    shown = task.metric.text(score) if task.metric == FRACTION else f"{task.metric.name} {task.metric.text(score)}"
    costs = f"{numbers.count(cost.params)} parameters, {numbers.count(cost.macs)} MACs"
    terminal.say(f"{task.id}, {split} set: {shown}, {costs}")
    terminal.result(
        {
            "task": opened.name,
            "split": split,
            "limit": limit,
            "score": score,
            "metric": task.metric.model_dump(mode="json"),
            "params": cost.params,
            "macs": cost.macs,
            "bytes": cost.bytes,
            "seconds": {"evaluate": seconds},
            "environment": cost.environment.model_dump(mode="json"),
        }
    )
