"""Models without labels or score, to be compressed by their weights or by unlabeled inputs of the user."""

from __future__ import annotations

import abc
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from torch import Tensor

from tenfold.errors import DataError
from tenfold.tasks.base import Progress, SizedBatches, Task


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
            msg = f"{self.id} is a model without data: give --data with inputs of your own, or --calibration 0"
            raise DataError(msg)
        return self.inputs_of(self.data, samples, batch_size=batch_size, seed=seed)

    def calibration_size(self, seed: int) -> int:
        """Return the number of inputs; 0 without ``data``."""
        if self.data is None:
            return 0
        return len(self.inputs_of(self.data, None, batch_size=1, seed=seed))

    def tune_settings(self) -> dict[str, Any]:
        """Return no epochs: there is nothing to train on."""
        return {"epochs": 0}

    def train_batches(
        self, epoch: int, *, batch_size: int, seed: int, hold_out: bool = False
    ) -> SizedBatches[tuple[Any, Tensor]]:
        """Raise DataError: there are no labels."""
        del epoch, batch_size, seed, hold_out
        self._refuse("trained on labels")

    def validation_batches(
        self, samples: int | None = None, *, batch_size: int, seed: int = 0
    ) -> SizedBatches[tuple[Any, Tensor]]:
        """Raise DataError: there are no labels."""
        del samples, batch_size, seed
        self._refuse("validated")

    def test_batches(self, samples: int | None = None, *, batch_size: int) -> SizedBatches[tuple[Any, Tensor]]:
        """Raise DataError: there are no labels."""
        del samples, batch_size
        self._refuse("tested")

    def evaluate(
        self,
        model: Any,
        *,
        split: str = "test",
        limit: int | None = None,
        batch_size: int = 125,
        progress: Progress | None = None,
    ) -> float:
        """Raise DataError: there is no score."""
        del model, split, limit, batch_size, progress
        self._refuse("scored")

    def _refuse(self, what: str) -> NoReturn:
        msg = (
            f"{self.id} is a model without labels: it cannot be {what}. Write a task with its data and score "
            "(--task file.py:Class), or leave that to your own loop."
        )
        raise DataError(msg)
