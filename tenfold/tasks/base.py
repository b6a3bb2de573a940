"""What a task is: a model, its data and its score. One subclass in one file makes a task."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from tenfold.errors import CheckpointError, DataError, UnknownNameError
from tenfold.registry import Registry, did_you_mean
from tenfold.tasks.dense_weights import load_weights
from tenfold.tracing.contexts import device_of, dtype_of, evaluating
from tenfold.tracing.inputs import call_model, to_device

Batch_co = TypeVar("Batch_co", covariant=True)
Progress = Callable[[int, int], None]  # (samples done, samples in total; 0 where that is not known)

SPLITS = ("test", "validation")


class SizedBatches(Protocol[Batch_co]):
    """Batches whose number is known and that come out identically each time they are gone through."""

    def __len__(self) -> int:
        """Return the number of batches."""
        ...

    def __iter__(self) -> Iterator[Batch_co]:
        """Go through the batches, from the first."""
        ...


class Task(abc.ABC):
    """A model, its data and its score: what the command line and the benchmarks run on.

    Making a task is cheap: no data is read and no model built before a method asks for it. Training, calibration and
    validation draw on the training set only; the test set serves ``evaluate(split="test")`` and nothing else. The
    validation part is fixed for good, whatever the seed, and calibration never sees it; ``train_batches`` uses *all*
    training samples unless ``hold_out=True`` leaves the validation part out.

    With the whole data set in memory, derive from :class:`~tenfold.tasks.in_memory.InMemoryTask`, which needs four
    methods; for anything else implement the methods here.

    Args:
        variant: which of ``variants``; the first when left out.
        data: where to look for the data; each task says what it expects there.
        seed: fixes the fresh weights of ``build`` and whatever training ``pretrained`` does.

    Raises:
        UnknownNameError: the task has no such variant.
    """

    name: ClassVar[str]
    variants: ClassVar[tuple[str, ...]] = ()  # the first is the default; empty: there is only one
    labelled: ClassVar[bool] = True  # whether there is anything to train on and to score

    def __init__(self, variant: str | None = None, *, data: Path | str | None = None, seed: int = 0) -> None:
        if variant is not None and variant not in self.variants:
            hint = did_you_mean(variant, self.variants) if self.variants else f"Write {self.name!r} alone."
            msg = f"task {self.name!r} has no variant {variant!r}. {hint}"
            raise UnknownNameError(msg)
        self.variant = variant if variant is not None else next(iter(self.variants), None)
        self.data = None if data is None else Path(data).expanduser()
        self.seed = seed

    # --- the model ---

    @abc.abstractmethod
    def architecture(self) -> nn.Module:
        """Return the model with fresh weights. ``build`` calls this with torch's random numbers seeded."""

    def pretrained(self) -> nn.Module:
        """Return the trained model if no weights file is given: trained here, or from another library.

        Raises:
            CheckpointError: the task has none, as by default.
        """
        msg = (
            f"{self.id} has no built-in weights. Pass a .safetensors file with the state dict "
            "(weights=FILE, or --weights FILE)."
        )
        raise CheckpointError(msg)

    def build(self) -> nn.Module:
        """Return a freshly initialised model in eval mode, the same for the same seed: the skeleton for checkpoints."""
        with torch.random.fork_rng(devices=[]):  # CPU only: the model is built there
            torch.manual_seed(self.seed)
            return self.architecture().eval()

    def dense(self, weights: Path | str | None = None) -> nn.Module:
        """Return the trained dense model in eval mode: from a .safetensors file, or else what ``pretrained`` gives.

        Raises:
            CheckpointError: the file is missing, damaged or made for another model, or there is nothing without one.
        """
        return (self.pretrained() if weights is None else load_weights(self.build(), weights)).eval()

    @abc.abstractmethod
    def example_inputs(self, batch_size: int = 1) -> Any:
        """Return what the model's forward takes, always the same for one ``batch_size``; no data needed."""

    # --- the data ---

    @abc.abstractmethod
    def train_batches(
        self, epoch: int, *, batch_size: int, seed: int, hold_out: bool = False
    ) -> SizedBatches[tuple[Any, Tensor]]:
        """Return the (inputs, labels) of one epoch, augmented and shuffled by (seed, epoch).

        All training samples, unless ``hold_out`` leaves the validation part out.
        """

    @abc.abstractmethod
    def calibration_batches(self, samples: int, *, batch_size: int, seed: int) -> SizedBatches[Any]:
        """Return inputs chosen by ``seed`` from the training set outside its validation part, not augmented."""

    def calibration_size(self, seed: int) -> int:
        """Return how many samples ``calibration_batches`` can choose from."""
        return len(self.train_batches(0, batch_size=1, seed=seed, hold_out=True))

    def unlabeled_batches(
        self, epoch: int, samples: int, *, batch_size: int, seed: int
    ) -> SizedBatches[tuple[Any, None]]:
        """Return one epoch of the calibration samples as (inputs, None), to train on by a teacher's answers alone.

        Augmented and shuffled by (seed, epoch) where the task knows how; here as ``calibration_batches`` gives them.
        """
        del epoch
        return _WithoutLabels(self.calibration_batches(samples, batch_size=batch_size, seed=seed))

    @abc.abstractmethod
    def validation_batches(
        self, samples: int | None = None, *, batch_size: int, seed: int = 0
    ) -> SizedBatches[tuple[Any, Tensor]]:
        """Return (inputs, labels) of the validation part of the training set, for choices; at most ``samples``."""

    @abc.abstractmethod
    def test_batches(self, samples: int | None = None, *, batch_size: int) -> SizedBatches[tuple[Any, Tensor]]:
        """Return (inputs, labels) of the whole test set, or of a fixed choice of at most ``samples`` from it."""

    # --- the score ---

    def evaluate(
        self,
        model: nn.Module,
        *,
        split: str = "test",
        limit: int | None = None,
        batch_size: int = 125,
        progress: Progress | None = None,
    ) -> float:
        """Return the fraction of samples whose largest output is the label.

        Inputs go to the device and floating-point type of the model; the model runs in eval mode and gets the modes
        of its modules back.

        Args:
            model: gives one row of class scores for each sample.
            split: "test", or "validation": the held-out part of the training set, on which choices may be made. A
                network that was trained on the whole training set has seen those samples: its score there flatters.
            limit: so many samples at most, a fixed choice; the whole split by default.
            batch_size: samples a forward.
            progress: called with (samples done, samples in total) after each batch.

        Raises:
            DataError: an unknown split, or data that is missing or damaged.
            ProfileError: the model does not run on the inputs.
        """
        if split not in SPLITS:
            msg = f"unknown split {split!r}. Known: {', '.join(SPLITS)}."
            raise DataError(msg)
        read = self.test_batches if split == "test" else self.validation_batches
        return accuracy(model, read(limit, batch_size=batch_size), progress)

    def tune_settings(self) -> dict[str, Any]:
        """Return fields of ``TuneConfig`` for fine-tuning a compressed model of this task."""
        return {}

    # --- its checkpoints ---

    @classmethod
    def recorded(cls, text: str, checkpoint: Path) -> str:
        """Return the text of the task for a checkpoint that was made for ``text``: usually just that."""
        del checkpoint
        return text

    def write_beside(self, model: nn.Module, folder: Path) -> None:  # noqa: B027 - most have nothing
        """Write what else a checkpoint of ``model`` should hold into its folder; usually nothing."""

    @property
    def id(self) -> str:
        """The text that loads this task again: ``name``, or ``name:variant``."""
        return self.name if self.variant is None else f"{self.name}:{self.variant}"

    def describe(self) -> dict[str, Any]:
        """Return what identifies the task, as plain values for records and cards."""
        summary = (type(self).__doc__ or "").strip().split("\n", 1)[0]
        data = None if self.data is None else str(self.data)
        return {"task": self.id, "summary": summary, "data": data, "seed": self.seed}


@dataclass(frozen=True, eq=False)
class _WithoutLabels:
    """Inputs, each with None in the place of the labels."""

    inputs: SizedBatches[Any]

    def __len__(self) -> int:
        return len(self.inputs)

    def __iter__(self) -> Iterator[tuple[Any, None]]:
        return ((inputs, None) for inputs in self.inputs)


def accuracy(model: nn.Module, batches: SizedBatches[tuple[Any, Tensor]], progress: Progress | None = None) -> float:
    """Return the fraction of samples whose largest output (or largest of its ``logits``) is the label.

    Inputs are passed on as :func:`~tenfold.tracing.inputs.call_model` takes them, on the device and in the
    floating-point type of the model. The modes of all modules are restored.

    Example:
        >>> scores, labels = torch.eye(4), torch.tensor([0, 1, 2, 0])
        >>> accuracy(nn.Identity(), [(scores, labels)])
        0.75
    """
    device, dtype = device_of(model), dtype_of(model)
    correct = done = 0
    total = int(getattr(batches, "samples", 0))
    with evaluating(model):
        for inputs, labels in batches:
            outputs = call_model(model, to_device(inputs, device, dtype))
            scores: Tensor = getattr(outputs, "logits", outputs)
            correct += int((scores.argmax(1) == labels.to(scores.device)).sum())
            done += len(labels)
            if progress is not None:
                progress(done, total)
    if done == 0:
        msg = "there is no sample to evaluate on"
        raise DataError(msg)
    return correct / done


def seeded(*seeds: int) -> torch.Generator:
    """Return a random generator for this sequence of seeds; neighbouring seeds give unrelated numbers.

    Example:
        >>> torch.equal(torch.rand(3, generator=seeded(0, 1)), torch.rand(3, generator=seeded(0, 1)))
        True
    """
    mixed = np.random.SeedSequence([seed % 2**64 for seed in seeds]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(mixed[0]))


TASKS: Registry[Task] = Registry("task")
