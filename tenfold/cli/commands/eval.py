"""tenfold eval: how good a model is."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import PositiveInt

from tenfold.cli.source import Machine, Source
from tenfold.cli.terminal import Terminal
from tenfold.records import Seed

if TYPE_CHECKING:
    from tenfold.cli.source import Opened
    from tenfold.records import Agreement

ORDER = 50
UNLABELED = 500  # samples without labels to compare on


def run(
    source: Source,
    machine: Machine,
    terminal: Terminal,
    *,
    split: Literal["test", "validation"] = "test",
    limit: PositiveInt | None = None,
    batch_size: PositiveInt = 125,
    streamed: bool = False,
    seed: Seed = 0,
) -> None:
    """Score a model, dense (--weights) or compressed (--checkpoint), on its test set.

    tenfold eval --task cifar10:resnet56 --weights resnet56.safetensors
    tenfold eval --checkpoint small --data unseen.txt

    A compressed model of a task without a score (hf:, timm:, torchvision:) is compared with the original on the inputs
    in --data: top-1 and KL of scores of classes, else cosine and relative error. Name inputs that it has not seen.

    With --json, one object: `task`, `split`, `score`, `elsewhere` (scores on further data, by name, where the task has
    some), `metric` (name, unit, direction; a fraction unless the task says otherwise), `agreement`, `params`, `macs`,
    `bytes`, `seconds`, `environment`.

    Args:
        source: the model.
        machine: where to run it.
        terminal: what to show.
        split: the test set, or the part held out of the training set.
        limit: at most so many samples, a fixed choice; of inputs in --data without labels 500 by default.
        batch_size: samples per forward.
        streamed: hold one block of the model at a time: for language models in a folder (lm:) that do not fit into
            memory.
        seed: of the task.
    """
    from tenfold.cli.source import open_source
    from tenfold.cli.streamed_source import StreamedScores
    from tenfold.planning import Score
    from tenfold.profiling import profile
    from tenfold.records.metric import FRACTION
    from tenfold.reporting import numbers
    from tenfold.runtime import Runtime

    terminal.step("open the model")
    opened = open_source(source, machine, seed)
    scored = StreamedScores(opened, source) if streamed else None
    cost = profile(opened.model, opened.inputs()) if scored is None else scored.profile()
    terminal.step("evaluate")
    start = time.perf_counter()
    progress = Runtime(on_event=terminal.on_event).counter("evaluate")
    task, score, agreed = opened.task, None, None
    elsewhere: Mapping[str, float] = {}
    if scored is not None:
        score = scored.score(split, limit, batch_size, progress)
        elsewhere = scored.elsewhere(limit, batch_size) if split == "test" else {}
        shown = f"{split} set: {task.metric.name} {task.metric.text(score)}"
    elif task.scored or source.checkpoint is None:
        evaluate = partial(task.evaluate, split=split, limit=limit, batch_size=batch_size, progress=progress)
        score = Score(evaluate, metric=task.metric).of_original(opened.model)
        shown = task.metric.text(score) if task.metric == FRACTION else f"{task.metric.name} {task.metric.text(score)}"
        shown = f"{split} set: {shown}"
        elsewhere = task.scores_elsewhere(opened.model, limit=limit, batch_size=batch_size) if split == "test" else {}
    else:
        agreed = _agreement(opened, limit or UNLABELED, seed)
        shown = f"against the original on {agreed.samples} samples: {agreed.figures()}"
    seconds = time.perf_counter() - start
    costs = f"{numbers.count(cost.params)} parameters, {numbers.count(cost.macs)} MACs"
    terminal.say(f"{task.id}, {shown}, {costs}")
    for name, value in elsewhere.items():
        terminal.say(f"{task.id}, {name}: {task.metric.name} {task.metric.text(value)}")
    terminal.result(
        {
            "task": opened.name,
            "split": split,
            "limit": limit,
            "score": score,
            "elsewhere": elsewhere,
            "metric": task.metric.model_dump(mode="json"),
            "agreement": None if agreed is None else agreed.model_dump(mode="json", exclude={"held_out"}),
            "params": cost.params,
            "macs": cost.macs,
            "bytes": cost.bytes,
            "seconds": {"evaluate": seconds},
            "environment": cost.environment.model_dump(mode="json"),
        }
    )


def _agreement(opened: Opened, samples: int, seed: int) -> Agreement:
    """Return how far a compressed model agrees with the original on unlabeled inputs of the user."""
    from tenfold.cli.recovery import CalibrationBatches
    from tenfold.profiling import agreement
    from tenfold.tensors.finite import check_finite

    batches = CalibrationBatches(opened, min(samples, opened.task.calibration_size(seed)) or samples, seed)
    dense = opened.task.dense(None).to(opened.device).eval()
    check_finite(dense, opened.task.id)
    # Whether ``compress`` has seen these inputs is not known here.
    return agreement(dense, opened.model, batches, held_out=False)
