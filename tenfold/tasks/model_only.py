"""Models without labels or score, to be compressed by their weights or by unlabeled inputs of the user."""

from __future__ import annotations

import abc
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from tenfold.errors import DataError
from tenfold.tasks.base import SizedBatches, Task


def _refused(what: str) -> Callable[..., Any]:
    """Return a method that raises DataError: there are no labels."""

    def refuse(self: Task, *_: Any, **__: Any) -> NoReturn:
        msg = (
            f"{self.id} is a model without labels: it cannot be {what}. Write a task with its data and score "
            "(--task file.py:Class), or leave that to your own loop."
        )
        raise DataError(msg)

    return refuse


class ModelOnly(Task):
    """A model of a library by name, without labels or score.

    It is profiled, planned, compressed and saved like any other. ``data`` names unlabeled inputs for calibration.
    Training with labels and scoring raise an error.

    Args:
        variant: name of the model.
        data: unlabeled inputs: see the task.
        seed: of the initial weights of ``build`` and the choice of inputs.
    """

    labelled: ClassVar[bool] = False
    scored: ClassVar[bool] = False
    tune_settings: ClassVar[dict[str, Any]] = {"epochs": 0}

    def __init__(self, variant: str | None = None, *, data: Path | str | None = None, seed: int = 0) -> None:
        super().__init__(None, data=data, seed=seed)
        self.variant = variant or self.variant

    @abc.abstractmethod
    def inputs_of(self, source: Path, samples: int | None, *, batch_size: int, seed: int) -> SizedBatches[Any]:
        """Return unlabeled inputs, at most ``samples`` from a file or folder, sampled by ``seed``."""

    def calibration_batches(self, samples: int, *, batch_size: int, seed: int) -> SizedBatches[Any]:
        """Return inputs from ``data``, sampled by ``seed``.

        Raises:
            DataError: there is no ``data``, or it cannot be read.
        """
        if self.data is None:
            msg = f"{self.id} is a model without data: give --data with inputs of your own, or --calibration-samples 0"
            raise DataError(msg)
        return self.inputs_of(self.data, samples, batch_size=batch_size, seed=seed)

    def calibration_size(self, seed: int) -> int:
        """Return the number of inputs; 0 without ``data``."""
        if self.data is None:
            return 0
        return len(self.inputs_of(self.data, None, batch_size=1, seed=seed))

    train_batches = _refused("trained on labels")
    validation_batches = _refused("validated")
    test_batches = _refused("tested")
    evaluate = _refused("scored")
