"""Stages with the training built in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tenfold.allocation.schedule import Schedule
from tenfold.iterative.run import stages
from tenfold.iterative.stage import Stage
from tenfold.pipeline import Compressed
from tenfold.records import Recipe
from tenfold.runtime import Runtime
from tenfold.training import Batches, TrainingFolder, TuneConfig, TuneProgress, TuneResult, finetune

Loss = Callable[[nn.Module, Any, Any], Tensor]
Tune = Callable[[Stage], Any]


@dataclass(frozen=True, eq=False)
class Training:
    """How the built-in loop trains each stage.

    Use it with ``compress_iteratively`` where you have no training loop of your own.

    Attributes:
        batches: of (inputs, targets); see ``finetune``. A function of the epoch is called with numbers that continue
            from stage to stage.
        config: of fine-tuning, for as many epochs as the schedule gives a stage.
        loss: see ``finetune``. A teacher comes in here.
        progress: called on each step.
        on_stage: called with each stage before it is trained.
    """

    batches: Batches
    config: TuneConfig = field(default_factory=TuneConfig)
    loss: Loss | None = None
    progress: TuneProgress | None = None
    on_stage: Callable[[Stage], None] | None = None

    def __call__(self, stage: Stage) -> TuneResult:
        """Train a stage in place; return the history."""
        if self.on_stage is not None:
            self.on_stage(stage)
        return tune_stage(stage, self.batches, self.config, loss=self.loss, progress=self.progress)


def compress_iteratively(
    model: nn.Module,
    example_inputs: Any,
    recipe: Recipe | Mapping[str, Any] | str,
    schedule: Schedule | Mapping[str, Any] | None = None,
    *,
    tune: Training | Tune,
    data: Iterable[Any] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    runtime: Runtime | None = None,
) -> Compressed:
    """Return a model that was compressed and trained in stages, with the plan of all stages and the record.

    Use it where one step to the budget loses too much accuracy; with a loop of your own, use ``stages``.

    Args:
        model: any trained module; stays as it is.
        example_inputs: what its forward takes.
        recipe: what is wanted in the end; see ``stages``.
        schedule: in how many stages, how far in each, and how many epochs.
        tune: a ``Training``; or a function that is called with each stage and trains ``stage.model`` in place. The
            history of a ``TuneResult`` it returns is recorded.
        data: unlabeled batches; see ``stages``.
        evaluate: returns the score of a model; see ``stages``.
        runtime: with a ``folder``, the same call continues where it was killed, within a stage after the last complete
            epoch, and ends on the same CPU bit for bit where an uninterrupted run ends.

    Raises:
        TenfoldError: see ``stages`` and ``finetune``.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 2))
        >>> x = torch.randn(64, 16)
        >>> tune = Training([(x, (x[:, 0] > 0).long())])
        >>> result = compress_iteratively(net, x[:1], "macs=0.4", Schedule(rounds=2, epochs=1), tune=tune)
        >>> [round(stage.after.macs / result.record.before.macs, 2) for stage in result.record.stages]
        [0.6, 0.39]
    """
    runtime = runtime or Runtime()
    if isinstance(tune, Training):
        settings = tune.config.replace(epochs=0).to_json()
        runtime = runtime.replace(identity=f"{runtime.identity} {settings}".strip())
    run = stages(model, example_inputs, recipe, schedule, data=data, evaluate=evaluate, runtime=runtime)
    result: Any = None
    try:
        while True:
            result = tune(run.send(result))
            result = result if isinstance(result, TuneResult) else None
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
