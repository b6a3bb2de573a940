"""Make batches of inputs of what people call data: loaders with labels, data sets, arrays, one big tensor."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, default_collate

from tenfold.errors import DataError
from tenfold.tracing.inputs import arguments, batch_size_of, describe_inputs, map_tensors, tensors_in, to_device
from tenfold.tracing.labels import BatchReader

logger = logging.getLogger("tenfold")

_SAMPLES = 32  # of a batch that is made here, where the example inputs are a single sample


class GatheredBatches(list[Any]):
    """Batches of inputs as the forward takes them, with nothing left to recognise."""


class InputBatches:
    """Batches of inputs as a forward takes them, read from what a user has; iterated over as often as the data can be.

    Labels are dropped, samples of a data set are collated, arrays become tensors, and one tensor (or mapping) of all
    samples is split into batches: see ``BatchReader`` for how labels are recognised.

    Args:
        data: an iterable of batches such as a DataLoader, a data set, or all samples as one tensor or mapping.
        model: that the batches are for.
        example: inputs that fix the structure; without, the signature of the forward decides alone.

    Raises:
        DataError: the data are nothing of that kind; the message says what to pass.

    Example:
        >>> loader = [(torch.zeros(2, 4), torch.tensor([0, 1]))]
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as said:
        ...     batches = list(InputBatches(loader, nn.Linear(4, 2), torch.zeros(1, 4)))
        >>> [tuple(batch.shape) for batch in batches], len(said)
        ([(2, 4)], 1)
    """

    def __init__(self, data: Any, model: nn.Module, example: Any = None) -> None:
        _check_kind(data)
        self._data, self._example = data, example
        self._reader = BatchReader(model, example)
        self._lead = None if example is None else next(tensors_in(arguments(example)), None)
        size = None if example is None else batch_size_of(example)
        self._size = size if size is not None and size > 1 else _SAMPLES

    def __iter__(self) -> Iterator[Any]:
        whole = self._as_one()
        if whole is not None:
            yield from map(self._reader.read, whole)
            return
        items = (self._tensors(item) for item in _items(self._data))
        try:
            first = next(items)
        except StopIteration:
            return
        if self._is_sample(first):
            logger.info("the data are single samples: they are put together in batches of up to %d", self._size)
            samples = self._chained(first, items)
            while chunk := list(islice(samples, self._size)):
                yield from map(self._reader.read, _collated(chunk))
            return
        yield from map(self._reader.read, self._chained(first, items))

    @staticmethod
    def _chained(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
        yield first
        yield from rest

    def _as_one(self) -> Iterator[Any] | None:
        """Return the batches of data that are one batch of all samples; None where they are several already."""
        data, lead = self._tensors(self._data) if not isinstance(self._data, Dataset) else None, self._lead
        if isinstance(data, Mapping):
            return self._split(data)
        if lead is None:
            return None
        if isinstance(data, Tensor) and data.dim() != lead.dim() + 1:
            if len(list(tensors_in(arguments(self._example)))) > 1:
                msg = (
                    f"the data are one tensor {list(data.shape)}, and the forward takes "
                    f"{describe_inputs(self._example)}: pass an iterable of batches of this structure"
                )
                raise DataError(msg)
            if data.dim() < lead.dim():
                msg = (
                    f"the data are one tensor {list(data.shape)}, a single sample without a batch axis: the example "
                    f"inputs are {list(lead.shape)}. Pass batches like these, such as [data[None]]"
                )
                raise DataError(msg)
            return self._split(data)
        if isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(t, Tensor) for t in data):
            inputs, labels = data
            if labels.dim() < inputs.dim() == lead.dim() and labels.shape[:1] == inputs.shape[:1]:
                return self._split(data)  # one batch with its labels, as a loader puts out
        return None

    def _split(self, data: Any) -> Iterator[Any]:
        lengths = {int(t.shape[0]) if t.dim() else 0 for t in tensors_in(data)}
        if len(lengths) != 1:
            yield data
            return
        (length,) = lengths
        if length > self._size:
            logger.info("the data are %d samples in one piece: they are split into batches of %d", length, self._size)
        for start in range(0, length, self._size):
            yield map_tensors(data, lambda t, start=start: t[start : start + self._size])  # type: ignore[misc]

    def _is_sample(self, item: Any) -> bool:
        """Whether an item lacks the batch axis that the example inputs have."""
        if self._lead is None or self._lead.dim() < 1:
            return False
        lead = next(tensors_in(arguments(self._reader.inputs_of(item))), None)
        return lead is not None and lead.dim() == self._lead.dim() - 1 and not lead.is_nested

    def _tensors(self, tree: Any) -> Any:
        """Return a tree with tensors in place of arrays, those of floats in the type of the example inputs."""
        if isinstance(tree, np.ndarray):
            if tree.dtype.kind not in "biufc":
                msg = f"the data hold an array of {tree.dtype}, which has no tensor: pass numbers"
                raise DataError(msg)
            tensor = torch.from_numpy(np.ascontiguousarray(tree))
            floats = self._lead is not None and self._lead.is_floating_point()
            wanted = self._lead.dtype if floats and self._lead is not None else torch.get_default_dtype()
            return tensor.to(wanted) if tensor.is_floating_point() else tensor
        if isinstance(tree, Mapping) and any(isinstance(v, np.ndarray) for v in tree.values()):
            return {key: self._tensors(value) for key, value in tree.items()}
        if isinstance(tree, tuple | list) and any(isinstance(v, np.ndarray) for v in tree):
            return tuple(map(self._tensors, tree))
        return tree


def input_batches(data: Any, model: nn.Module, example: Any = None) -> Iterable[Any]:
    """Return batches as the forward takes them; those that were recognised before are returned as they are."""
    return data if isinstance(data, GatheredBatches | InputBatches) else InputBatches(data, model, example)


def gathered(data: Any, model: nn.Module, example: Any, device: torch.device) -> GatheredBatches:
    """Collect all batches of the data as the forward takes them, on a device; see ``InputBatches``.

    Raises:
        DataError: there are no batches, or the data are no batches.
    """
    batches = GatheredBatches(to_device(batch, device) for batch in input_batches(data, model, example))
    if not batches:
        msg = (
            "no calibration batches: the iterable is empty (an exhausted generator?). Pass a list or a new generator, "
            "or leave data out to plan by the weights alone."
        )
        raise DataError(msg)
    return batches


def _check_kind(data: Any) -> None:
    """Raise DataError, with what to pass, for what is no data."""
    way_out = "pass batches of inputs, such as a list of tensors or a DataLoader"
    if isinstance(data, str | bytes | Path):
        msg = f"data={str(data)[:80]!r} is a text or a path, and no data: read it and {way_out}"
    elif isinstance(data, nn.Module) or (callable(data) and not hasattr(data, "__iter__") and not _is_dataset(data)):
        msg = f"data is of type {type(data).__name__}, which is called and not read: {way_out}, or what it returns"
    elif not isinstance(data, Iterable) and not _is_dataset(data):
        msg = f"data is of type {type(data).__name__}, which holds no batches: {way_out}"
    elif isinstance(data, Tensor) and not data.dim():
        msg = f"data is a tensor without axes: {way_out}"
    else:
        return
    raise DataError(msg)


def _is_dataset(data: Any) -> bool:
    return isinstance(data, Dataset) or (hasattr(data, "__getitem__") and hasattr(data, "__len__"))


def _items(data: Any) -> Iterator[Any]:
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        return (data[i] for i in range(len(data)))  # type: ignore[arg-type]
    return iter(data)


def _collated(samples: list[Any]) -> Iterator[Any]:
    """Yield the samples as one batch; as batches of one where their shapes differ."""
    try:
        yield default_collate(samples)
    except (RuntimeError, TypeError) as error:
        if len(samples) == 1:
            msg = f"the data hold samples of which no batch can be made: {error}. Pass batches of tensors"
            raise DataError(msg) from error
        for sample in samples:
            yield from _collated([sample])
