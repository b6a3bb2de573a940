"""From options to batches for calibration, and to a fine-tuning run that can be killed and resumed."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold.cli.terminal import Misuse
from tenfold.errors import TuningError

if TYPE_CHECKING:
    from torch import nn

    from tenfold.cli.options import Data, Recover, Training
    from tenfold.cli.scaling import Launch
    from tenfold.cli.sources import Opened
    from tenfold.training import Distillation, EpochRecord, TuneConfig, TuneResult

DEFAULT_CALIBRATION = 2000
CALIBRATION_BATCH = 100

logger = logging.getLogger("tenfold")


@dataclass(frozen=True, eq=False)
class Calibration:
    """Batches of training inputs on the device of the model; no data is read before they are gone through."""

    opened: Opened
    samples: int
    seed: int

    def __iter__(self) -> Iterator[Any]:
        from tenfold.tracing import to_device
        from tenfold.tracing.contexts import dtype_of

        dtype, task = dtype_of(self.opened.model), self.opened.task
        for batch in task.calibration_batches(self.samples, batch_size=CALIBRATION_BATCH, seed=self.seed):
            yield to_device(batch, self.opened.device, dtype)


def calibration(opened: Opened, data: Data, seed: int) -> Calibration | None:
    """Return the samples to look at; None where none are wanted, or they are for batch norm and there is none."""
    from tenfold.surgery.batchnorm import BATCH_NORMS

    if data.calibration == 0:
        return None
    if data.use_data == "norms" and not any(isinstance(m, BATCH_NORMS) for m in opened.model.modules()):
        return None
    if data.calibration is not None:
        return Calibration(opened, data.calibration, seed)
    there = opened.task.calibration_size(seed)
    return Calibration(opened, min(DEFAULT_CALIBRATION, there), seed) if there else None


def tune_config(
    opened: Opened, training: Training, epochs: int | None, seed: int, *, label_free: bool = False
) -> TuneConfig:
    """Return how to tune: what the task recommends, or what suits a teacher alone, and over it what the options say.

    Raises:
        TuningError: a value that cannot be.
    """
    from pydantic import ValidationError

    from tenfold.records import explain
    from tenfold.training.config import GENTLE, TuneConfig

    given = {"epochs": epochs, "lr": training.lr, "batch_size": training.batch_size}
    recommended = opened.task.tune_settings | (GENTLE if label_free else {})
    settings = {"seed": seed, **recommended, **{k: v for k, v in given.items() if v is not None}}
    try:
        return TuneConfig(**settings)
    except ValidationError as error:
        msg = f"cannot tune like this: {explain(error)}"
        raise TuningError(msg) from error


def evaluator(opened: Opened, recover: Recover) -> Callable[[nn.Module], float] | None:
    """Return what scores models; None where that is not wanted, or the task has no score."""
    if not opened.task.labelled:
        if recover.evaluate:
            logger.info("%s is a model without labels: it is neither trained nor scored", opened.task.id)
        return None
    return opened.task.evaluate if recover.evaluate else None


def wanted_epochs(recover: Recover) -> int | None:
    """Return the epochs asked for; None to let the task say."""
    if recover.no_tune and recover.tune_epochs:
        msg = "give --tune-epochs or --no-tune, not both."
        raise Misuse(msg)
    return 0 if recover.no_tune else recover.tune_epochs


@dataclass(frozen=True)
class Teaching:
    """How much the dense model teaches the small one; with ``samples``, so many and no labels."""

    share: float
    temperature: float
    samples: int | None = None

    @classmethod
    def of(cls, recover: Recover, training: Training, data: Data) -> Teaching | None:
        """Return what the options say; None for labels alone."""
        if not recover.label_free:
            return None if training.distill is None else cls(training.distill, training.temperature)
        if training.distill is not None:
            msg = "give --distill or --label-free, not both: without labels the dense model's answers are all there is."
            raise Misuse(msg)
        if data.calibration == 0:
            msg = "--label-free trains on the calibration samples: give --calibration N with N > 0, or leave it out."
            raise Misuse(msg)
        return cls(1.0, training.temperature, DEFAULT_CALIBRATION if data.calibration is None else data.calibration)

    def loss(self, teacher: nn.Module, config: TuneConfig) -> Distillation:
        """Return the loss with the dense model as the teacher."""
        from tenfold.training import Distillation

        smoothing = config.label_smoothing
        return Distillation(teacher, share=self.share, temperature=self.temperature, label_smoothing=smoothing)


@dataclass(frozen=True, eq=False)
class Tuner:
    """Fine-tunes a model of the task in place, keeping every complete epoch in a folder beside the output.

    ``identity`` names all that the outcome depends on besides the configuration. Another identity or configuration has
    another folder, so that only the very same command goes on where it was cut off.
    """

    opened: Opened
    config: TuneConfig
    out: Path
    identity: str
    quiet: bool = False
    teaching: Teaching | None = None
    teacher: nn.Module | None = None  # the opened model if None
    launch: Launch | None = None  # the processes that tune together

    @property
    def _root(self) -> Path:
        return self.out.parent / f".{self.out.name}.tuning"

    @property
    def folder(self) -> Path:
        """Where the epochs are kept."""
        text = f"{self.identity}\n{self.config.to_json()}"
        return self._root / hashlib.blake2b(text.encode(), digest_size=6).hexdigest()

    def __call__(self, model: nn.Module) -> TuneResult:
        """Return the history of tuning the model."""
        from tenfold.training import RichProgress, TrainingFolder, TuneProgress, finetune

        if self.launch is not None:
            model = self.launch.share(model)
        task, size, seed = self.opened.task, self.config.batch_size, self.config.seed
        batches: Any = partial(task.train_batches, batch_size=size, seed=seed)
        if self.teaching is not None and self.teaching.samples is not None:
            batches = partial(task.unlabeled_batches, samples=self.teaching.samples, batch_size=size, seed=seed)
        try:
            return finetune(
                model,
                batches,
                self.config,
                loss=None if self.teaching is None else self.teaching.loss(self._teacher(), self.config),
                folder=TrainingFolder(self.folder, self.identity),
                progress=TuneProgress(self._log) if self.quiet else RichProgress(on_epoch=self._log),
                accelerator=None if self.launch is None else self.launch.accelerator,
            )
        except KeyboardInterrupt:
            msg = "interrupted; the same command goes on after the last complete epoch"
            raise KeyboardInterrupt(msg) from None

    def _teacher(self) -> nn.Module:
        return self.opened.model if self.teacher is None else self.teacher

    def clean(self) -> None:
        """Remove the kept epochs, when the outcome is saved."""
        shutil.rmtree(self._root, ignore_errors=True)

    def _log(self, epoch: EpochRecord) -> None:
        place = f"{epoch.epoch}/{self.config.epochs}"
        logger.info("epoch %s: loss %.4f, %.1f s", place, epoch.loss, epoch.seconds)


def identity_of(opened: Opened, *facts: object) -> str:
    """Return a digest of the model as it is now and of the facts that an outcome depends on."""
    from tenfold.checkpoint import digest

    return digest(opened.model.state_dict(), "\n".join(map(str, (opened.name, *facts))))
