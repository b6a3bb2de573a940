"""Batches in parts that are small enough to differentiate, where the samples of a batch do not depend on each other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from tenfold.errors import TenfoldError
from tenfold.tracing.inputs import batch_size_of, map_tensors, tensors_in
from tenfold.tracing.randomness import Randomness
from tenfold.tracing.samples import common_axis, samples_in
from tenfold.tracing.trace import storage_of

logger = logging.getLogger("tenfold")

Forward = Callable[[nn.Module, Any], Any]

# What one part may hold for its backward pass. Larger parts are hardly faster.
PART_BYTES = 64 << 20


@dataclass(frozen=True)
class Split:
    """How batches are differentiated, and what that takes.

    Attributes:
        rows: samples at a time; None for whole batches.
        held: bytes that these hold between forward and backward.
        alive: the most bytes of what modules without children put out that something still reads, for a sample.
    """

    rows: int | None = None
    held: int = 0
    alive: int = 0


def split_of(model: nn.Module, batch: Any, forward: Forward) -> Split:
    """Return how to differentiate batches like this one.

    A batch is split where one sample alone shows that all would hold more than ``PART_BYTES``, and where the first and
    the last part give the outputs of the whole: of tensors with another first axis than the batch they do not.

    Args:
        model: whose graph is recorded: its layers are watched already.
        batch: inputs as ``forward`` takes them.
        forward: runs the model on a batch.
    """
    size = common_axis(batch)
    with Randomness(model, batch).seeded(0):
        try:
            one = next(parts_of(batch, 1))
            each, alive = memory_of(model, one, forward), alive_in(model, one, forward) // samples_in(one)
            rows = max(1, PART_BYTES // max(each, 1))
            if size and (rows >= size or _independent(model, batch, forward, rows)):
                return Split(rows if rows < size else None, min(rows, size) * each, alive)
        except Exception:
            logger.debug("batches are differentiated whole", exc_info=True)
        try:
            held, alive = memory_of(model, batch, forward), alive_in(model, batch, forward)
        except TenfoldError:  # what it holds cannot be seen, as within transforms of torch.func
            return Split()
    return Split(None, held, alive // samples_in(batch))


def parts_of(batch: Any, rows: int | None) -> Iterator[Any]:
    """Iterate over a batch some rows at a time; over the batch itself if None, or if its tensors differ in number.

    Example:
        >>> [part["x"].shape[0] for part in parts_of({"x": torch.zeros(5, 2)}, 2)]
        [2, 2, 1]
    """
    size = common_axis(batch)
    if rows is None or size <= rows:
        yield batch
        return
    for start in range(0, size, rows):
        yield _part(batch, slice(start, start + rows))


def memory_of(model: nn.Module, batch: Any, forward: Forward) -> int:
    """Return the bytes that a forward holds for its backward pass; parameters and buffers are not counted."""
    own = {storage_of(t) for t in chain(model.parameters(), model.buffers())}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = storage_of(tensor)
        if storage is not None and storage not in own:
            held[storage] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = forward(model, batch)
    for tensor in tensors_in(outputs):
        pack(tensor)
    return sum(held.values())


def alive_in(model: nn.Module, batch: Any, forward: Forward) -> int:
    """Return the most bytes that outputs of modules without children take at a time in a forward without gradients."""
    alive: dict[StorageWeakRef, int] = {}
    most = 0

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        nonlocal most
        alive.update((StorageWeakRef(t.untyped_storage()), t.untyped_storage().nbytes()) for t in tensors_in(output))
        most = max(most, sum(size for storage, size in alive.items() if not storage.expired()))

    with ExitStack() as stack:
        for module in model.modules():
            if not any(True for _ in module.children()) and not isinstance(module, torch.jit.ScriptModule):
                stack.enter_context(module.register_forward_hook(leave))
        stack.enter_context(torch.no_grad())
        forward(model, batch)
    return most


def _independent(model: nn.Module, batch: Any, forward: Forward, rows: int) -> bool:
    """Whether the first and the last part of a batch have the outputs that the whole has there."""
    size = batch_size_of(batch) or 0
    parts = [(0, min(rows, size)), (size - rows, size)]
    with torch.no_grad():
        whole = _floats(forward(model, batch))
        for start, end in parts:
            found, where = _floats(forward(model, _part(batch, slice(start, end)))), slice(start, end)
            if len(found) != len(whole) or not all(map(_is_part, found, whole, repeat(where))):
                return False
    return bool(whole)


def _part(batch: Any, where: slice) -> Any:
    return map_tensors(batch, lambda tensor: tensor[where])


def _floats(outputs: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(outputs) if tensor.is_floating_point()]


def _is_part(part: Tensor, whole: Tensor, where: slice) -> bool:
    wanted = whole[where] if whole.dim() else whole
    if wanted.shape != part.shape or not whole.dim():
        return False
    close = torch.finfo(part.dtype).eps ** 0.5 * wanted.abs().max().clamp_min(torch.finfo(part.dtype).tiny)
    return bool(((part - wanted).abs() <= close).all())
