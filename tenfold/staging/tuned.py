"""Stages with the training built in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tenfold.errors import TuningError
from tenfold.pipeline import Compressed
from tenfold.staging.run import stages
from tenfold.staging.schedule import Schedule
from tenfold.staging.stage import Stage
from tenfold.training import Batches, TrainingFolder, TuneConfig, TuneProgress, TuneResult, finetune

Loss = Callable[[nn.Module, Any, Any], Tensor]
Tune = Callable[[Stage], Any]


def run_stages(
    model: nn.Module,
    example_inputs: Any,
    schedule: Schedule | Mapping[str, Any],
    *,
    tune: TuneConfig | Tune,
    batches: Batches | None = None,
    loss: Loss | None = None,
    progress: TuneProgress | None = None,
    on_stage: Callable[[Stage], None] | None = None,
    folder: str | Path | None = None,
    identity: str = "",
    **choices: Any,
) -> Compressed:
    """Return a model that was compressed and trained in stages, with the plan of all stages and the record.

    Args:
        model: any trained module; stays as it is.
        example_inputs: what its forward takes.
        schedule: in how many stages, how far in each, and how many epochs.
        tune: how to fine-tune each stage, for as many epochs as the schedule says; or a function that is called with
            each stage and trains ``stage.model`` in place. The history of a ``TuneResult`` it returns is recorded.
        batches: of (inputs, targets), for a ``TuneConfig``; see ``finetune``. A function of the epoch is called with
            numbers that go on from stage to stage.
        loss: for a ``TuneConfig``; see ``finetune``. A teacher comes in here.
        progress: told of each step of such a training.
        on_stage: called with each stage before it is trained.
        folder: where to keep the stages; the same call then goes on where it was killed, within a stage after the last
            complete epoch, and ends on the same CPU bit for bit where an uninterrupted run ends.
        identity: whatever else the outcome depends on, such as the loss, in any words; a folder of another is refused.
        choices: all else that ``stages`` takes, such as ``data`` and ``evaluate``.

    Raises:
        TenfoldError: see ``stages`` and ``finetune``.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 2))
        >>> x = torch.randn(64, 16)
        >>> told = run_stages(
        ...     net,
        ...     x[:1],
        ...     Schedule(rounds=2, budget={"macs": 0.4}, epochs=1),
        ...     tune=TuneConfig(),
        ...     batches=[(x, (x[:, 0] > 0).long())],
        ... )
        >>> [round(stage.after.macs / told.record.before.macs, 2) for stage in told.record.stages]
        [0.6, 0.39]
    """
    given = Schedule.of(dict(schedule) if isinstance(schedule, Mapping) else schedule)
    if isinstance(tune, TuneConfig):
        if batches is None:
            msg = "a TuneConfig needs batches of (inputs, targets) to train on: pass batches=, or a function as tune="
            raise TuningError(msg)
        config: TuneConfig = tune
        identity = f"{identity} {config.replace(epochs=0).to_json()}".strip()

        train: Tune = partial(tune_stage, batches=batches, config=config, loss=loss, progress=progress)
    else:
        train = tune
    run = stages(model, example_inputs, given, folder=folder, identity=identity, **choices)
    told: Any = None
    try:
        while True:
            stage = run.send(told)
            if on_stage is not None:
                on_stage(stage)
            told = train(stage)
            told = told if isinstance(told, TuneResult) else None
    except StopIteration as end:
        outcome: Compressed = end.value
        return outcome


def tune_stage(
    stage: Stage,
    batches: Batches,
    config: TuneConfig,
    *,
    loss: Loss | None = None,
    progress: TuneProgress | None = None,
) -> TuneResult:
    """Return the history of fine-tuning a stage in place, for as many epochs as the schedule gives it.

    Each stage sees other shuffles and other random numbers than the ones before, and goes on in the middle if the run
    has a folder.
    """
    own = config.replace(epochs=stage.epochs, seed=config.seed + stage.index - 1)
    return finetune(
        stage.model,
        shifted(batches, stage.done_epochs),
        own,
        loss=loss,
        folder=None if stage.folder is None else TrainingFolder(stage.folder, stage.identity),
        progress=progress,
    )


def shifted(batches: Batches, epochs: int) -> Batches:
    """Return the batches as they are after so many epochs; what is no function of the epoch stays as it is."""
    if not callable(batches):
        return batches

    def later(epoch: int) -> Iterable[Any]:
        found: Iterable[Any] = batches(epoch + epochs)
        return found

    return later
