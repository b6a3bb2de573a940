"""Tasks whose data fits in memory as two tensors, with seeded shuffling, sampling, hold-out and augmentation."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from tenfold.errors import DataError
from tenfold.tasks.base import MappedBatches, Task, seeded

Split = Literal["train", "test"]

HELD_OUT = 0.1  # share of the training set that is the validation part
_HOLD, _CHOOSE, _SHUFFLE, _AUGMENT = range(4)  # keeps the streams of random numbers apart


class Transform(abc.ABC):
    """Preparation and augmentation of stored samples."""

    @abc.abstractmethod
    def prepare(self, inputs: Tensor) -> Tensor:
        """Return stored samples as the model takes them, such as normalised floats."""

    @abc.abstractmethod
    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """Return an augmented copy of stored samples, for training."""


class AsStored(Transform):
    """The identity: samples as they are stored, without augmentation."""

    def prepare(self, inputs: Tensor) -> Tensor:
        """Return the inputs."""
        return inputs

    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """Return the inputs."""
        del generator
        return inputs


@dataclass(frozen=True, eq=False)
class TensorSet:
    """Samples and labels as two tensors of equal length.

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
    """The samples of ``data`` at ``order``, as (inputs, labels); augmented if there is a seed for it."""

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
        """Number of samples in all batches."""
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


class InMemoryTask(Task):
    """A task whose training and test sets are tensors.

    Subclasses supply ``architecture``, ``read`` and ``input_shape``, usually ``pretrained``, and for pictures a
    ``transform``. The validation part is ``held_out``, by default a tenth of the training set, the same for every seed.
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
        """Return seeded noise of shape (batch_size, *input_shape), without reading data."""
        return torch.randn(batch_size, *self.input_shape, generator=seeded(0))

    def train_batches(self, epoch: int, *, batch_size: int, seed: int, hold_out: bool = False) -> LabelledBatches:
        """Return one epoch, shuffled and augmented by (seed, epoch)."""
        pool = self._parts.fitting if hold_out else torch.arange(len(self.train_set))
        order = pool[torch.randperm(len(pool), generator=seeded(seed, epoch, _SHUFFLE))]
        return LabelledBatches(self.train_set, order, batch_size, self.transform, (seed, epoch))

    def calibration_batches(self, samples: int, *, batch_size: int, seed: int) -> MappedBatches[Tensor]:
        """Return inputs sampled by ``seed`` from the training set without its validation part."""
        labelled = LabelledBatches(self.train_set, self._unlabeled(samples, seed), batch_size, self.transform)
        return MappedBatches(labelled, itemgetter(0))

    def unlabeled_batches(
        self, epoch: int, samples: int, *, batch_size: int, seed: int
    ) -> MappedBatches[tuple[Tensor, None]]:
        """Return one epoch of the calibration samples without labels, shuffled and augmented by (seed, epoch)."""
        chosen = self._unlabeled(samples, seed)
        order = chosen[torch.randperm(len(chosen), generator=seeded(seed, epoch, _SHUFFLE))]
        labelled = LabelledBatches(self.train_set, order, batch_size, self.transform, (seed, epoch))
        return MappedBatches(labelled, lambda batch: (batch[0], None))

    def _unlabeled(self, samples: int, seed: int) -> Tensor:
        return _choose(self._parts.fitting, samples, seed, f"the part of {self.name} for calibration")

    def validation_batches(self, samples: int | None = None, *, batch_size: int, seed: int = 0) -> LabelledBatches:
        """Return (inputs, labels) of the validation part, or of at most ``samples`` from it, sampled by ``seed``."""
        part, what = self._parts.validation, f"the validation part of {self.name}"
        chosen = part if samples is None else _choose(part, min(samples, len(part)), seed, what)
        return LabelledBatches(self.train_set, chosen, batch_size, self.transform)

    def test_batches(self, samples: int | None = None, *, batch_size: int) -> LabelledBatches:
        """Return (inputs, labels) of the test set, or of a fixed random subset of at most ``samples``."""
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
        """Return the indices of the validation part among the ``samples``; None, the default, draws a tenth."""
        del samples
        return None


@dataclass(frozen=True, eq=False)
class _Parts:
    """Indices of the training samples outside and inside the validation part."""

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
        order = torch.randperm(samples, generator=seeded(0, _HOLD))  # a constant: the split must not depend on a seed
        return cls(order[:-held], order[-held:].sort().values)


def _choose(pool: Tensor, samples: int, seed: int, what: str) -> Tensor:
    if not 1 <= samples <= len(pool):
        msg = f"{samples} samples asked for; {what} has {len(pool)}. Ask for 1 to {len(pool)}."
        raise DataError(msg)
    return pool[torch.randperm(len(pool), generator=seeded(seed, _CHOOSE))[:samples]]
