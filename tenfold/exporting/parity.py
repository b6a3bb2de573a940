"""Compare the outputs of an exported file with eager execution, on batches of several sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tenfold.errors import ExportError, TenfoldError
from tenfold.runtimes.program import at_batch, first_words
from tenfold.tracing.inputs import batch_size_of, call_model, tensors_in

_SIZES = (1, 2, 5)
_ROUNDINGS = 4  # a runtime that sums in another order rounds values in half precision elsewhere


def check_parity(
    model: nn.Module,
    exported: nn.Module,
    inputs: Any,
    *,
    dynamic_batch: bool,
    tolerance: float,
    max_batch: int | None = None,
) -> dict[int, float]:
    """Return the largest error of an output, relative to its largest entry, by batch size.

    Args:
        model: in evaluation mode.
        exported: the file as a module.
        inputs: as ``call_model`` takes them.
        dynamic_batch: whether to try other batch sizes too.
        tolerance: the largest error allowed, where the precision of the outputs can tell as much.
        max_batch: the largest batch size that the file takes, which is tried too; None for no limit.

    Raises:
        ExportError: an error is larger, the number or shape of the outputs differs, or the file does not run.
    """
    own = batch_size_of(inputs) or 1
    errors = {}
    for size in sorted({own, *_SIZES, max_batch or own}) if dynamic_batch else (own,):
        batch = at_batch(inputs, size) if dynamic_batch else inputs
        with torch.no_grad():
            wanted = list(tensors_in((call_model(model, batch),)))
            try:
                found = list(tensors_in((call_model(exported, batch),)))
            except TenfoldError as error:
                msg = f"the exported file does not run on a batch of {size}: {first_words(error.__cause__ or error)}"
                raise ExportError(msg) from error
        errors[size] = _largest_error(wanted, found, size)
        allowed = max([tolerance, *(_ROUNDINGS * torch.finfo(t.dtype).eps for t in wanted if t.is_floating_point())])
        if errors[size] > allowed:
            msg = (
                f"the exported file is off by {errors[size]:.2g} of the largest output on a batch of {size}, "
                f"more than the tolerance {allowed:g}: nothing was kept"
            )
            raise ExportError(msg)
    return errors


def _largest_error(wanted: list[Tensor], found: list[Tensor], size: int) -> float:
    shapes = [[tuple(t.shape) for t in tensors] for tensors in (wanted, found)]
    if shapes[0] != shapes[1]:
        msg = f"on a batch of {size} the exported file gives outputs {shapes[1]}, the model {shapes[0]}"
        raise ExportError(msg)
    largest = 0.0
    for a, b in zip(wanted, found, strict=True):
        if not a.numel():
            continue
        one, other = a.double(), b.double()
        if not bool(torch.isfinite(one).all()):
            msg = "outputs of the model are NaN or infinite on the example inputs: nothing can be compared with them"
            raise ExportError(msg)
        off = float((one - other).abs().nan_to_num(torch.inf).max())
        largest = max(largest, off / max(float(one.abs().max()), torch.finfo(torch.float32).tiny))
    return largest
