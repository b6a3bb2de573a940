"""Logits of teachers cached on disk: distillation at the cost of ordinary training."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.errors import CheckpointError, DataError
from tenfold.files import atomic_write
from tenfold.tensors.tensor_file import check_digest, read_tensors, write_tensors
from tenfold.tracing.contexts import device_of, evaluating
from tenfold.tracing.inputs import call_model, to_device
from tenfold.training.batches import Batch, as_pair
from tenfold.training.losses import logits_of
from tenfold.training.precision import uses_bf16


class CachedLogits:
    """Batches for ``finetune`` whose targets are pairs (labels, logits of the teachers).

    A teacher adds a third to the cost of training, in every epoch of every run. Here the augmented data of the first
    ``views`` epochs are repeated, and the logits of the teachers on them are stored (Shen & Xing 2021, "A fast
    knowledge distillation framework", arXiv 2112.01528); runs with the same folder share them. Train with
    ``Distillation(None)``, which reads the logits from the targets.

    Stored and freshly computed epochs are equal bit for bit.

    Args:
        teachers: one model or several, on the device of the data.
        batches: function from the epoch to (inputs, labels), deterministic.
        folder: of the files, which are named after the teachers and ``about``.
        views: number of different epochs of data.
        about: description of the data, such as batch size, augmentation and seed; other data get other files.

    Raises:
        DataError: no teacher, or fewer than one view.

    Example:
        >>> teacher, x = nn.Linear(4, 3), torch.randn(8, 4)
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     batches = CachedLogits(teacher, lambda epoch: [(x, torch.zeros(8))], folder, views=2)
        ...     (inputs, (labels, logits)), = batches(epoch=5)
        >>> logits.shape  # (samples, teachers, classes)
        torch.Size([8, 1, 3])
    """

    def __init__(
        self,
        teachers: nn.Module | Sequence[nn.Module],
        batches: Callable[[int], Iterable[Batch]],
        folder: str | Path,
        *,
        views: int = 8,
        about: str = "",
    ) -> None:
        self.teachers = (teachers,) if isinstance(teachers, nn.Module) else tuple(teachers)
        if not self.teachers or views < 1:
            msg = f"{len(self.teachers)} teachers and {views} views: at least one of each is needed"
            raise DataError(msg)
        self.batches, self.folder, self.views = batches, Path(folder), views
        self.name = _fingerprint(self.teachers, about)

    def __call__(self, epoch: int) -> Iterable[Batch]:
        """Return (inputs, (labels, logits)) of an epoch; logits are (samples, teachers, classes) in float16."""
        view = epoch % self.views
        return _View(self.teachers, self.batches(view), self.folder / f"{self.name}-{view:03d}.safetensors")


@dataclass(frozen=True, eq=False)
class _View:
    """The data of one epoch with the logits of the teachers, read from the file or written to it."""

    teachers: tuple[nn.Module, ...]
    data: Iterable[Batch]
    path: Path

    def __len__(self) -> int:
        if not isinstance(self.data, Sized):
            msg = f"batches of type {type(self.data).__name__} have no length"
            raise TypeError(msg)
        return len(self.data)

    def __iter__(self) -> Iterator[Batch]:
        if self.path.is_file():
            yield from self._read()
            return
        logits: list[Tensor] = []
        for batch in self.data:
            inputs, labels = as_pair(batch)
            logits.append(self._ask(inputs))
            yield inputs, (labels, logits[-1])
        if logits:
            with atomic_write(self.path) as partial:  # the last of several writers wins, with the same content
                write_tensors(partial, {"logits": torch.cat(logits)}, {}, ())

    def _read(self) -> Iterator[Batch]:
        try:
            tensors, header = read_tensors(self.path)
            check_digest(self.path, tensors, header, ())
            stored = tensors["logits"]
        except (CheckpointError, KeyError) as error:
            msg = f"{self.path} is damaged ({error}): delete it, and it is computed again"
            raise CheckpointError(msg) from None
        done = 0
        for batch in self.data:
            inputs, labels = as_pair(batch)
            logits = stored[done : done + len(labels)]
            done += len(labels)
            if len(logits) != len(labels):
                break
            yield inputs, (labels, logits)
        if done != len(stored):
            msg = (
                f"{self.path} has logits of {len(stored)} samples, the data at least {done}. Name the data in `about`."
            )
            raise CheckpointError(msg)

    def _ask(self, inputs: Any) -> Tensor:
        """Return the logits of all teachers, (samples, teachers, classes), rounded as in the file."""
        logits = []
        for teacher in self.teachers:
            device = device_of(teacher)
            bf16 = uses_bf16(teacher, device, "auto")
            with evaluating(teacher), torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
                output = call_model(teacher, to_device(inputs, device))
            logits.append(logits_of(output))
        return torch.stack(logits, dim=1).half().cpu()


def _fingerprint(teachers: Sequence[nn.Module], about: str) -> str:
    found = hashlib.blake2b(f"2 {about}".encode(), digest_size=8)  # 2: files have a digest
    for teacher in teachers:
        for name, tensor in teacher.state_dict().items():
            found.update(name.encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
