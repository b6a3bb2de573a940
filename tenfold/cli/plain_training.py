"""From a task to its trained network: plain training, for networks that are small from the start."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tenfold.cli.recovery import forget_epochs, tune_config, tuning_folder
from tenfold.cli.source import Machine, Source, open_source
from tenfold.cli.terminal import Misuse, Terminal

if TYPE_CHECKING:
    from tenfold.records import Recipe, TuneConfig

WEIGHTS, HISTORY = "model.safetensors", "training.json"
_LEFT_OPEN = {"seed"}


def train_plain(
    source: Source, recipe: Recipe, tune: TuneConfig, out: Path, machine: Machine, terminal: Terminal
) -> None:
    """Train the network of a task from its initial weights, and write weights and history into a folder.

    Raises:
        Misuse: weights, a checkpoint or choices about a compressed model, of which there is none.
    """
    from tenfold.checkpoint import digest
    from tenfold.checkpoint.state_dicts import write_state_dict
    from tenfold.records import write_text
    from tenfold.training import TrainingFolder, TuneEvents, finetune

    chosen = sorted(recipe.model_fields_set - _LEFT_OPEN)
    if source.weights is not None or source.checkpoint is not None or chosen:
        given = chosen[0].replace("_", "-") if chosen else "weights" if source.weights is not None else "checkpoint"
        msg = f"--method plain trains the network of the task from its initial weights; leave --{given} out."
        raise Misuse(msg)
    opened = open_source(source, machine, recipe.seed)
    task, config = opened.task, tune_config(opened, tune, recipe.seed)
    task.train_batches(0, batch_size=1, seed=config.seed)  # says why not: now, not after the rest
    model = task.build().to(opened.device)
    identity = digest(model.state_dict(), f"{opened.name}\nplain\n{config.to_json()}")
    terminal.step("train")
    start = time.perf_counter()
    result = finetune(
        model,
        partial(task.train_batches, batch_size=config.batch_size, seed=config.seed),
        config,
        loss=task.loss(),
        folder=TrainingFolder(tuning_folder(out, identity), identity),
        progress=TuneEvents(terminal.on_event, "train"),
    )
    terminal.step("evaluate")
    found = {
        "task": opened.name,
        "seed": recipe.seed,
        "params": sum(p.numel() for p in model.parameters()),
        "metric": task.metric.model_dump(mode="json"),
        "score": task.evaluate(model) if task.scored else None,
        "seconds": time.perf_counter() - start,
        "tuning": [epoch.model_dump(mode="json") for epoch in result.history],
    }
    out.mkdir(parents=True, exist_ok=True)
    write_state_dict(model.state_dict(), out / WEIGHTS)
    write_text(out / HISTORY, json.dumps(found, indent=1) + "\n")
    forget_epochs(out)
    terminal.say(f"{found['params']:,} parameters, {task.metric.name} {found['score']}. Saved in {out / WEIGHTS}")
    terminal.result(found | {"out": str(out)})
