"""Tasks: a model, its data and its score. One subclass in one file makes a task."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from tenfold.checkpoint.hub_facts import HubFacts
from tenfold.errors import CheckpointError, DataError, UnknownNameError
from tenfold.progress import counter
from tenfold.records import Metric
from tenfold.records.metric import FRACTION
from tenfold.registry import Registry, did_you_mean
from tenfold.tasks.dense_weights import load_weights
from tenfold.tracing.contexts import device_of, dtype_of, evaluating
from tenfold.tracing.inputs import call_model, to_device

T = TypeVar("T")
Batch_co = TypeVar("Batch_co", covariant=True)
Progress = Callable[[int, int], None]  # (samples done, samples in total or 0 if unknown)

SPLITS = ("test", "validation")


class SizedBatches(Protocol[Batch_co]):
    """Batches with a length, identical in every iteration."""

    def __len__(self) -> int:
        """Return the number of batches."""
        ...

    def __iter__(self) -> Iterator[Batch_co]:
        """Iterate over the batches, from the first."""
        ...


class Task(abc.ABC):
    """A model, its data and its score, for the command line and the benchmarks.

    Use it to give the command line a model, data and a score of your own; ``InMemoryTask`` is the shortest way.

    Creating a task is cheap: data is read and models are built on demand. Training, calibration and validation use the
    training set only, and the test set is for ``evaluate(split="test")`` alone. The validation part does not depend on
    the seed, and calibration never sees it; ``train_batches`` uses *all* training samples unless ``hold_out=True``
    leaves the validation part out.

    With the whole data set in memory, derive from :class:`~tenfold.tasks.in_memory.InMemoryTask`, which needs four
    methods; for anything else implement the methods here.

    Args:
        variant: one of ``variants``; the first by default.
        data: folder or file of the data; see the task.
        seed: of the initial weights of ``build`` and of any training in ``pretrained``.

    Raises:
        UnknownNameError: the task has no such variant.
    """

    name: ClassVar[str]
    variants: ClassVar[tuple[str, ...]] = ()  # the first is the default
    metric: ClassVar[Metric] = FRACTION  # what ``evaluate`` returns: name, unit, and which direction is better
    labelled: ClassVar[bool] = True  # whether it has labels to train with
    scored: ClassVar[bool] = True  # whether it can score a model
    looked_at: ClassVar[int] = 2000  # samples to calibrate with, unless somebody says how many
    extra: ClassVar[str] = ""  # the extra of tenfold that brings what it needs besides torch
    weights_hint: ClassVar[str] = ""  # how to train weights of one's own, for a message
    tune_settings: ClassVar[dict[str, Any]] = {}  # fields of TuneConfig for fine-tuning a compressed model

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
        """Return the model with initial weights. ``build`` calls this with torch's generator seeded."""

    def pretrained(self) -> nn.Module:
        """Return the trained model if no weights file is given: trained here, or from another library.

        Raises:
            CheckpointError: the task has none, as by default.
        """
        msg = (
            f"{self.id} has no built-in weights. {self.weights_hint}Pass a .safetensors file with the state dict "
            "(weights=FILE, or --weights FILE)."
        )
        raise CheckpointError(msg)

    def build(self) -> nn.Module:
        """Return a freshly initialised model in eval mode, deterministic in the seed: the skeleton for checkpoints."""
        with torch.random.fork_rng(devices=[]):  # CPU only: the model is built there
            torch.manual_seed(self.seed)
            return self.architecture().eval()

    def dense(self, weights: Path | str | None = None) -> nn.Module:
        """Return the trained dense model in eval mode, from a .safetensors file or else from ``pretrained``.

        Raises:
            CheckpointError: the file is missing, damaged or for another model, or there are no built-in weights.
        """
        return (self.pretrained() if weights is None else load_weights(self.build(), weights)).eval()

    @abc.abstractmethod
    def example_inputs(self, batch_size: int = 1) -> Any:
        """Return inputs of the model's forward, deterministic in ``batch_size``, without data."""

    # --- the data ---

    @abc.abstractmethod
    def train_batches(
        self, epoch: int, *, batch_size: int, seed: int, hold_out: bool = False
    ) -> SizedBatches[tuple[Any, Tensor]]:
        """Return the (inputs, labels) of one epoch, augmented and shuffled by (seed, epoch).

        All training samples, unless ``hold_out`` leaves the validation part out.
        """

    def loss(self) -> Callable[[nn.Module, Any, Any], Tensor] | None:
        """Return what training minimises, of (model, inputs, labels); None, the default, is cross-entropy."""
        return None

    @abc.abstractmethod
    def calibration_batches(self, samples: int, *, batch_size: int, seed: int) -> SizedBatches[Any]:
        """Return inputs sampled by ``seed`` from the training set without its validation part, not augmented."""

    def calibration_size(self, seed: int) -> int:
        """Return the number of samples available for calibration."""
        return len(self.train_batches(0, batch_size=1, seed=seed, hold_out=True))

    def unlabeled_batches(
        self, epoch: int, samples: int, *, batch_size: int, seed: int
    ) -> SizedBatches[tuple[Any, None]]:
        """Return one epoch of the calibration samples as (inputs, None), for distillation without labels.

        Subclasses may augment and shuffle by (seed, epoch); here they are those of ``calibration_batches``.
        """
        del epoch
        return MappedBatches(self.calibration_batches(samples, batch_size=batch_size, seed=seed), unlabeled)

    @abc.abstractmethod
    def validation_batches(
        self, samples: int | None = None, *, batch_size: int, seed: int = 0
    ) -> SizedBatches[tuple[Any, Tensor]]:
        """Return (inputs, labels) of the validation part of the training set, at most ``samples``."""

    @abc.abstractmethod
    def test_batches(self, samples: int | None = None, *, batch_size: int) -> SizedBatches[tuple[Any, Tensor]]:
        """Return (inputs, labels) of the test set, or of a fixed subset of at most ``samples``."""

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
        """Return the fraction of samples whose largest output is the label; a subclass may return another ``metric``.

        Inputs are moved to the device and floating-point type of the model, which runs in eval mode; the modes of its
        modules are restored.

        Args:
            model: returns one row of class scores per sample.
            split: "test", or "validation", the held-out part of the training set, for making choices. The score of a
                network that was trained on the whole training set is optimistic there.
            limit: at most so many samples, a fixed subset; the whole split by default.
            batch_size: samples per forward.
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

    def scores_elsewhere(
        self, model: nn.Module, *, limit: int | None = None, batch_size: int = 125
    ) -> Mapping[str, float]:
        """Return scores on further data that do not resemble the training set, by name; usually none.

        Args:
            model: as for ``evaluate``.
            limit: at most so many samples of each.
            batch_size: samples per forward.
        """
        del model, limit, batch_size
        return {}

    # --- its checkpoints ---

    @classmethod
    def recorded(cls, text: str, checkpoint: Path) -> str:
        """Return the task text to record in a checkpoint made for ``text``; usually ``text`` itself."""
        del checkpoint
        return text

    def write_beside(self, model: nn.Module, folder: Path) -> HubFacts | None:
        """Write further files of a checkpoint of ``model`` into its folder, usually none; return what its card says."""
        del model, folder
        return None

    @property
    def id(self) -> str:
        """The text that loads this task: ``name``, or ``name:variant``."""
        return self.name if self.variant is None else f"{self.name}:{self.variant}"

    def describe(self) -> dict[str, Any]:
        """Return the identity of the task as plain values, for records and cards."""
        summary = (type(self).__doc__ or "").strip().split("\n", 1)[0]
        data = None if self.data is None else str(self.data)
        return {"task": self.id, "summary": summary, "data": data, "seed": self.seed}


@dataclass(frozen=True, eq=False)
class MappedBatches(Generic[T]):
    """Batches that are transformed one by one as they are read."""

    batches: SizedBatches[Any]
    function: Callable[[Any], T]

    @property
    def samples(self) -> int:
        """Number of samples in all batches; 0 if unknown."""
        return int(getattr(self.batches, "samples", 0))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[T]:
        return map(self.function, self.batches)


def unlabeled(inputs: Any) -> tuple[Any, None]:
    """Return the inputs with None in place of labels."""
    return inputs, None


def accuracy(model: nn.Module, batches: SizedBatches[tuple[Any, Tensor]], progress: Progress | None = None) -> float:
    """Return the fraction of samples whose largest output (or largest of its ``logits``) is the label.

    Inputs are passed as :func:`~tenfold.tracing.inputs.call_model` takes them, on the device and in the floating-point
    type of the model. The modes of all modules are restored.

    Example:
        >>> scores, labels = torch.eye(4), torch.tensor([0, 1, 2, 0])
        >>> accuracy(nn.Identity(), [(scores, labels)])
        0.75
    """
    device, dtype = device_of(model), dtype_of(model)
    correct = done = 0
    total = int(getattr(batches, "samples", 0))
    progress = progress or (counter("evaluate") if total else None)
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
    """Return a random generator for a sequence of seeds; neighbouring seeds give unrelated numbers.

    Example:
        >>> torch.equal(torch.rand(3, generator=seeded(0, 1)), torch.rand(3, generator=seeded(0, 1)))
        True
    """
    mixed = np.random.SeedSequence([seed % 2**64 for seed in seeds]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(mixed[0]))


TASKS: Registry[Task] = Registry("task")
