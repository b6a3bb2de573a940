"""Trace a model by torch.export, with an open batch size."""

from __future__ import annotations

from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.errors import ExportError
from tenfold.exporting.quiet import quiet
from tenfold.tracing.inputs import arguments, batch_size_of, describe_inputs, map_tensors, tensors_in

_HINT = " With a fixed batch size (dynamic_batch=False, --fixed-batch) it may go."


def program_of(model: nn.Module, inputs: Any, *, dynamic_batch: bool, max_batch: int | None = None) -> Any:
    """Return the ``torch.export.ExportedProgram`` of a model in evaluation mode.

    Args:
        model: left unchanged.
        inputs: as ``call_model`` takes them.
        dynamic_batch: leave the first axis open in all inputs where it has the batch size.
        max_batch: the largest batch size; None for no limit.

    Raises:
        ExportError: the control flow of the forward depends on values, or on the batch size; or no input is a tensor.
    """
    if next(tensors_in(arguments(inputs)), None) is None:
        msg = (
            f"{type(model).__name__} takes no tensor in {describe_inputs(inputs)}: the file would hold its outputs for "
            "these as constants. Export the part of it that takes tensors"
        )
        raise ExportError(msg)
    example = at_batch(inputs, max(2, batch_size_of(inputs) or 2)) if dynamic_batch else inputs
    args, kwargs = arguments(example)
    shapes = None
    if dynamic_batch:
        batch, size = torch.export.Dim("batch", min=1, max=max_batch), batch_size_of(example)
        collection = torch.export.ShapesCollection()
        for tensor in tensors_in((args, kwargs)):
            if tensor.dim() and tensor.shape[0] == size:
                collection[tensor] = {0: batch}
        shapes = collection.dynamic_shapes(model, args, kwargs)
    try:
        with quiet(), redirect_stderr(StringIO()), torch.no_grad():  # torch prints the graph of what it refuses
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
    except Exception as error:
        msg = f"{type(model).__name__} cannot be exported on inputs {describe_inputs(example)}: {first_words(error)}."
        about_batch = dynamic_batch and "batch" in str(error)
        raise ExportError(msg + (_HINT if about_batch else "")) from error


def at_batch(inputs: Any, size: int) -> Any:
    """Return the inputs with another batch size; repeated samples are shifted along their last axis.

    Example:
        >>> at_batch(torch.tensor([[1, 2, 3]]), 2)
        tensor([[1, 2, 3],
                [3, 1, 2]])
    """
    old = batch_size_of(inputs)

    def resized(tensor: Tensor) -> Tensor:
        if old is None or not tensor.dim() or tensor.shape[0] != old:
            return tensor
        return torch.stack([tensor[k % old] if k < old or tensor.dim() < 2 else tensor[k % old].roll(k // old, -1)
                            for k in range(size)])  # fmt: skip

    return map_tensors(inputs, resized)


def first_words(error: BaseException, length: int = 300) -> str:
    """Return the beginning of an error message, in one line."""
    text = " ".join(str(error).split()) or "no message"
    cut = text if len(text) <= length else text[: length - 1].rstrip() + "…"
    return f"{type(error).__name__}: {cut}".rstrip(".")
