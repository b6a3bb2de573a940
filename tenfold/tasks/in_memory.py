"""Tasks whose data fits in memory as two tensors: shuffling, choosing, holding out and augmenting, all seeded."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from tenfold.errors import DataError
from tenfold.tasks.base import Task, seeded

Split = Literal["train", "test"]

HELD_OUT = 0.1  # share of the training set that is the validation part
_HOLD, _CHOOSE, _SHUFFLE, _AUGMENT = range(4)  # what random numbers are drawn for: keeps their streams apart


class Transform(abc.ABC):
    """What happens to stored samples on their way into the model."""

    @abc.abstractmethod
    def prepare(self, inputs: Tensor) -> Tensor:
        """Return what the model takes: stored samples as normalised floats."""

    @abc.abstractmethod
    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """Return a randomly changed copy of stored samples, for training."""


class AsStored(Transform):
    """Samples go into the model as they are stored, and training does not change them."""

    def prepare(self, inputs: Tensor) -> Tensor:
        """Return the inputs."""
        return inputs

    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """Return the inputs."""
        del generator
        return inputs


@dataclass(frozen=True, eq=False)
class TensorSet:
    """Samples and their labels, as two tensors of one length.

    Raises:
        DataError: there are no samples, or not one label for each.
    """

    inputs: Tensor  # (samples, ...), as stored: pictures as uint8
    labels: Tensor  # (samples,), int64

    def __post_init__(self) -> None:
        if len(self.inputs) == 0 or self.labels.shape != self.inputs.shape[:1]:
            msg = f"{len(self.inputs)} samples and labels of shape {tuple(self.labels.shape)}: need one label for each"
            raise DataError(msg)

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class LabelledBatches:
    """The samples of ``data`` at ``order``, as (inputs, labels); augmented where there is a seed for it."""

    data: TensorSet
    order: Tensor
    batch_size: int
    transform: Transform
    augment_seed: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            msg = f"batch_size={self.batch_size} must be at least 1"
            raise DataError(msg)

    @property
    def samples(self) -> int:
        """The number of samples in all batches together."""
        return len(self.order)

    def __len__(self) -> int:
        return math.ceil(self.samples / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = None if self.augment_seed is None else seeded(*self.augment_seed, _AUGMENT)
        for chosen in self.order.split(self.batch_size):
            inputs = self.data.inputs[chosen]
            if generator is not None:
                inputs = self.transform.augment(inputs, generator)
            yield self.transform.prepare(inputs), self.data.labels[chosen]


@dataclass(frozen=True, eq=False)
class InputBatches:
    """The same batches without their labels."""

    labelled: LabelledBatches

    @property
    def samples(self) -> int:
        """The number of samples in all batches together."""
        return self.labelled.samples

    def __len__(self) -> int:
        return len(self.labelled)

    def __iter__(self) -> Iterator[Tensor]:
        return (inputs for inputs, _ in self.labelled)


@dataclass(frozen=True, eq=False)
class UnlabeledBatches:
    """The same batches with None in the place of their labels."""

    labelled: LabelledBatches

    @property
    def samples(self) -> int:
        """The number of samples in all batches together."""
        return self.labelled.samples

    def __len__(self) -> int:
        return len(self.labelled)

    def __iter__(self) -> Iterator[tuple[Tensor, None]]:
        return ((inputs, None) for inputs, _ in self.labelled)


class InMemoryTask(Task):
    """A task whose training and test sets are tensors. A subclass says what the model is and how to read a set.

    Subclasses supply ``architecture``, ``pretrained``, ``read`` and ``input_shape``, and for pictures a ``transform``.
    A tenth of the training set, the same for every seed, is its validation part, or what ``held_out`` says.
    """

    input_shape: ClassVar[tuple[int, ...]]  # of one sample, as the model takes it
    transform: ClassVar[Transform] = AsStored()

    @abc.abstractmethod
    def read(self, split: Split) -> TensorSet:
        """Return the whole training or test set; called once for each.

        Raises:
            DataError: the data is missing, empty or damaged; the message says where it was looked for.
        """

    def example_inputs(self, batch_size: int = 1) -> Tensor:
        """Return seeded noise of the shape (batch_size, *input_shape): no data is read."""
        return torch.randn(batch_size, *self.input_shape, generator=seeded(0))

    def train_batches(self, epoch: int, *, batch_size: int, seed: int, hold_out: bool = False) -> LabelledBatches:
        """Return one epoch, shuffled and augmented by (seed, epoch)."""
        pool = self._parts.fitting if hold_out else torch.arange(len(self.train_set))
        order = pool[torch.randperm(len(pool), generator=seeded(seed, epoch, _SHUFFLE))]
        return LabelledBatches(self.train_set, order, batch_size, self.transform, (seed, epoch))

    def calibration_batches(self, samples: int, *, batch_size: int, seed: int) -> InputBatches:
        """Return inputs chosen by ``seed`` from the training set outside its validation part."""
        return InputBatches(LabelledBatches(self.train_set, self._unlabeled(samples, seed), batch_size, self.transform))

    def unlabeled_batches(self, epoch: int, samples: int, *, batch_size: int, seed: int) -> UnlabeledBatches:
        """Return one epoch of the calibration samples without labels, shuffled and augmented by (seed, epoch)."""
        chosen = self._unlabeled(samples, seed)
        order = chosen[torch.randperm(len(chosen), generator=seeded(seed, epoch, _SHUFFLE))]
        return UnlabeledBatches(LabelledBatches(self.train_set, order, batch_size, self.transform, (seed, epoch)))

    def _unlabeled(self, samples: int, seed: int) -> Tensor:
        return _choose(self._parts.fitting, samples, seed, f"the part of {self.name} for calibration")

    def validation_batches(self, samples: int | None = None, *, batch_size: int, seed: int = 0) -> LabelledBatches:
        """Return (inputs, labels) of the validation part, or of at most ``samples`` from it, chosen by ``seed``."""
        part, what = self._parts.validation, f"the validation part of {self.name}"
        chosen = part if samples is None else _choose(part, min(samples, len(part)), seed, what)
        return LabelledBatches(self.train_set, chosen, batch_size, self.transform)

    def test_batches(self, samples: int | None = None, *, batch_size: int) -> LabelledBatches:
        """Return (inputs, labels) of the test set, or of at most ``samples`` from it: not the first, often sorted."""
        every, what = torch.arange(len(self.test_set)), f"the test set of {self.name}"
        chosen = every if samples is None else _choose(every, min(samples, len(every)), 0, what)
        return LabelledBatches(self.test_set, chosen, batch_size, self.transform)

    @cached_property
    def train_set(self) -> TensorSet:
        """The whole training set."""
        return self.read("train")

    @cached_property
    def test_set(self) -> TensorSet:
        """The whole test set."""
        return self.read("test")

    @cached_property
    def _parts(self) -> _Parts:
        return _Parts.of(len(self.train_set), self.name, self.held_out(len(self.train_set)))

    def held_out(self, samples: int) -> Tensor | None:
        """Return which of the ``samples`` for training are the validation part, where the data set itself says so.

        None, the default, draws a tenth.
        """
        del samples
        return None


@dataclass(frozen=True, eq=False)
class _Parts:
    """Which training samples are held out for validation, and which are left."""

    fitting: Tensor
    validation: Tensor

    @classmethod
    def of(cls, samples: int, name: str, chosen: Tensor | None = None) -> Self:
        if chosen is not None:
            left = torch.ones(samples, dtype=torch.bool).index_fill(0, chosen, value=False)
            return cls(left.nonzero().squeeze(1), chosen)
        held = max(1, round(samples * HELD_OUT))
        if held >= samples:
            msg = f"the training set of {name} has {samples} sample: too few to hold any out"
            raise DataError(msg)
        order = torch.randperm(samples, generator=seeded(0, _HOLD))  # a constant: no seed may move the border
        return cls(order[:-held], order[-held:].sort().values)


def _choose(pool: Tensor, samples: int, seed: int, what: str) -> Tensor:
    """Return ``samples`` of the ``pool``, chosen by ``seed``."""
    if not 1 <= samples <= len(pool):
        msg = f"{samples} samples asked for; {what} has {len(pool)}. Ask for 1 to {len(pool)}."
        raise DataError(msg)
    return pool[torch.randperm(len(pool), generator=seeded(seed, _CHOOSE))[:samples]]
