"""From options to batches for calibration, and to a fine-tuning run that can be killed and resumed."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import Field, NonNegativeInt, ValidationError

from tenfold.cli.launch import Launch
from tenfold.cli.record_options import Fields
from tenfold.cli.terminal import Misuse, Options, Terminal
from tenfold.errors import TuningError
from tenfold.files import in_use
from tenfold.records import TuneConfig

if TYPE_CHECKING:
    from torch import nn

    from tenfold.cli.source import Opened
    from tenfold.planning import Score
    from tenfold.records import Recipe, TuneResult
    from tenfold.runtime import OnEvent
    from tenfold.training import Distillation
    from tenfold.training.loop import Loss

TuneOptions: TypeAlias = Annotated[TuneConfig, Fields("Fine-tuning; by default as the task recommends")]
DEFAULT_CALIBRATION = 2000
CALIBRATION_BATCH = 100

logger = logging.getLogger("tenfold")


class Distill(Options):
    """Recovery.

    Attributes:
        distill: share of the dense model's answers in the loss; the labels have the rest. Left out, labels alone.
        temperature: temperature of the distillation.
    """

    distill: Annotated[float, Field(ge=0, le=1)] | None = None
    temperature: Annotated[float, Field(ge=1)] = 4.0

    def teaching(self) -> Teaching | None:
        """Return how much the dense model teaches; None for labels alone."""
        return None if self.distill is None else Teaching(self.distill, self.temperature)


class Recover(Distill):
    """Recovery.

    Attributes:
        calibration_samples: training samples to look at, without labels; 0 for none. By default 2000 (128 sequences of
            a language model), or as many as there are.
        tune: fine-tune after the layers were replaced.
        label_free: tune on the calibration samples by the dense model's answers alone; labels are never read.
        eval: score the model on the test set.
        max_cache: hold at most so many activations of each of the two models while layers are fitted one after the
            other, such as 512MiB; beyond that they are computed again, with the same result.
    """

    calibration_samples: NonNegativeInt | None = None
    tune: bool = True
    label_free: bool = False
    eval: bool = True
    max_cache: Annotated[str, "SIZE"] = "4GiB"

    def config(self, opened: Opened, tune: TuneConfig, seed: int) -> TuneConfig:
        """Return how to tune, with 0 epochs for not at all; see ``tune_config``."""
        if not self.tune and "epochs" in tune.model_fields_set and tune.epochs:
            msg = "give --epochs or --no-tune, not both."
            raise Misuse(msg)
        config = tune_config(opened, tune, seed, label_free=self.label_free)
        config = config if self.tune else config.replace(epochs=0)
        if config.epochs and not self.label_free and not opened.task.labelled:
            opened.task.train_batches(0, batch_size=1, seed=seed)  # says why not: now, not after the rest
        return config

    def teaching(self) -> Teaching | None:
        """Return how much the dense model teaches, with samples where there are no labels; None for labels alone."""
        if not self.label_free:
            return super().teaching()
        if self.distill is not None:
            msg = "give --distill or --label-free, not both: without labels the dense model's answers are all there is."
            raise Misuse(msg)
        if self.calibration_samples == 0:
            msg = "--label-free trains on the calibration samples: leave --calibration-samples 0 out."
            raise Misuse(msg)
        return Teaching(1.0, self.temperature, self.calibration_samples or DEFAULT_CALIBRATION)

    def batches(self, opened: Opened, recipe: Recipe) -> CalibrationBatches | None:
        """Return the samples to look at; None where none are wanted, or they are for batch norm and there is none."""
        from tenfold.surgery.batchnorm import BATCH_NORMS

        samples, method, seed = self.calibration_samples, recipe.calibration.method, recipe.seed
        if samples == 0 or method == "none":
            return None
        if samples is not None:  # too many: said before the model is looked at
            opened.task.calibration_batches(samples, batch_size=CALIBRATION_BATCH, seed=seed)
        if method == "batchnorm" and not any(isinstance(m, BATCH_NORMS) for m in opened.model.modules()):
            return None
        if samples is None:
            samples = min(opened.task.looked_at, opened.task.calibration_size(seed))
        return CalibrationBatches(opened, samples, seed) if samples else None

    def evaluator(self, opened: Opened) -> Score | None:
        """Return what scores models; None where that is not wanted, or the task has no score."""
        if not opened.task.scored:
            if self.eval:
                logger.info("%s is a model without labels: it is neither trained nor scored", opened.task.id)
            return None
        return opened.score if self.eval else None


@dataclass(frozen=True, eq=False)
class CalibrationBatches:
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


def tune_config(opened: Opened, tune: TuneConfig, seed: int, *, label_free: bool = False) -> TuneConfig:
    """Return how to tune: what the task recommends, or what suits a teacher alone, and over it what is set in ``tune``.

    Raises:
        TuningError: a value that is not allowed.
    """
    from tenfold.records import explain
    from tenfold.records.tuning import GENTLE

    given = tune.model_dump(exclude_unset=True)
    settings = {"seed": seed, **opened.task.tune_settings, **(GENTLE if label_free else {}), **given}
    try:
        return TuneConfig(**settings)
    except ValidationError as error:
        msg = f"cannot tune like this: {explain(error)}"
        raise TuningError(msg) from error


@dataclass(frozen=True)
class Teaching:
    """How much the dense model teaches the small one; with ``samples``, so many and no labels."""

    share: float
    temperature: float
    samples: int | None = None

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
    on_event: OnEvent | None = None  # who sees how it goes
    teaching: Teaching | None = None
    teacher: nn.Module | None = None  # the opened model if None
    launch: Launch = field(default_factory=Launch)  # the processes that tune together

    def __call__(self, model: nn.Module) -> TuneResult:
        """Return the history of tuning the model."""
        from tenfold.training import TrainingFolder, TuneEvents, finetune

        model, identity = self.launch.share(model), f"{self.identity}\n{self.config.to_json()}"
        try:
            return finetune(
                model,
                self.batches,
                self.config,
                loss=self.loss,
                folder=TrainingFolder(tuning_folder(self.out, identity), self.identity),
                progress=None if self.on_event is None else TuneEvents(self.on_event),
                accelerator=self.launch.accelerator,
            )
        except KeyboardInterrupt:
            msg = "interrupted; the same command goes on after the last complete epoch"
            raise KeyboardInterrupt(msg) from None

    @property
    def batches(self) -> Callable[[int], Any]:
        """The batches of an epoch."""
        task, size, seed = self.opened.task, self.config.batch_size, self.config.seed
        if self.teaching is None or self.teaching.samples is None:
            return partial(task.train_batches, batch_size=size, seed=seed)
        samples = min(self.teaching.samples, task.calibration_size(seed))
        return partial(task.unlabeled_batches, samples=samples, batch_size=size, seed=seed)

    @property
    def loss(self) -> Loss | None:
        """The loss with the dense model as the teacher, or that of the task; None for cross-entropy."""
        if self.teaching is None:
            return self.opened.task.loss()
        return self.teaching.loss(self.opened.model if self.teacher is None else self.teacher, self.config)

    @property
    def settings(self) -> dict[str, Any]:
        """What the record says of it."""
        tuned = self.config.epochs > 0
        return {
            "tuning": self.config.model_dump() if tuned else None,
            "distillation": dataclasses.asdict(self.teaching) if tuned and self.teaching is not None else None,
        }


def claim(out: Path, terminal: Terminal) -> None:
    """Say now, and not after hours, if the folder ``out`` cannot be written, or if another run works for it.

    Raises:
        CheckpointError: it cannot be written, or holds other files.
        FileError: another run is to end there.
    """
    from tenfold.checkpoint import check_target

    check_target(out)
    terminal.hold(_at_work(out))


@contextmanager
def _at_work(out: Path) -> Iterator[None]:
    folder = tuning_folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with in_use(folder / ".lock", out):
            yield
    finally:
        with suppress(OSError):  # epochs to go on from are kept
            folder.rmdir()


def tuning_folder(out: Path, identity: str = "") -> Path:
    """Return where the epochs of a run are kept, beside its output; without an identity those of all runs."""
    root = out.parent / f".{out.name}.tuning"
    name = hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
    return root / name if identity else root


def forget_epochs(out: Path) -> None:
    """Remove the kept epochs, when the outcome is saved."""
    shutil.rmtree(tuning_folder(out), ignore_errors=True)


def identity_of(opened: Opened, *facts: object) -> str:
    """Return a digest of the model as it is now and of the facts that an outcome depends on."""
    from tenfold.checkpoint import digest

    return digest(opened.model.state_dict(), "\n".join(map(str, (opened.name, *facts))))
