"""Trace a model by torch.export, with an open batch size."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, suppress
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from tenfold.errors import ExportError, TenfoldError
from tenfold.runtimes.quiet import quiet
from tenfold.tracing.contexts import evaluating
from tenfold.tracing.inputs import arguments, batch_size_of, call_model, describe_inputs, map_tensors, tensors_in

_HINT = " With a fixed batch size (dynamic_batch=False, --fixed-batch) it may go."
_PYTREE_HINT = (
    " Return a tensor, tuple or dict, or register the class that is returned before: "
    "torch.export.register_dataclass(Output, serialized_type_name='Output')."
)
# Torch names the line that reads a value, at the end of a long message.
_READS = re.compile(r"The following call raised this error:\s+File \"([^\"]+)\", line (\d+), in \w+(?:\n {4}(\S.*))?")
_PACKED_HINT = (
    " Packed sequences cannot be exported: give the recurrent network padded ones, and leave out of its outputs what "
    "is past each length. A second direction begins, and the last state ends, in the padding: give sequences of one "
    "length, or take the state at each length."
)


def program_of(model: nn.Module, inputs: Any, *, dynamic_batch: bool, max_batch: int | None = None) -> Any:
    """Return the ``torch.export.ExportedProgram`` of a model in evaluation mode.

    Args:
        model: left unchanged.
        inputs: as ``call_model`` takes them.
        dynamic_batch: leave the first axis open in all inputs where it has the batch size.
        max_batch: the largest batch size, and that of the trace: operators that are chosen by it, such as convolutions
            of 16 samples and more, would otherwise lower the limit; None for no limit.

    Raises:
        ExportError: the control flow of the forward depends on values, or on the batch size; or no input is a tensor.
    """
    if next(tensors_in(arguments(inputs)), None) is None:
        msg = (
            f"{type(model).__name__} takes no tensor in {describe_inputs(inputs)}: the file would hold its outputs for "
            "these as constants. Export the part of it that takes tensors"
        )
        raise ExportError(msg)
    example = at_batch(inputs, max_batch or max(2, batch_size_of(inputs) or 2)) if dynamic_batch else inputs
    args, kwargs = arguments(example)
    collection = torch.export.ShapesCollection()
    if dynamic_batch:
        batch, size = torch.export.Dim("batch", min=1, max=max_batch), batch_size_of(example)
        for tensor in tensors_in((args, kwargs)):
            if tensor.dim() and tensor.shape[0] == size:
                collection[tensor] = {0: batch}
    try:
        # Torch prints the graph of what it refuses.
        with quiet(), redirect_stderr(StringIO()), torch.no_grad(), _keywords_by_name(model, kwargs):
            shapes = collection.dynamic_shapes(model, args, kwargs) if dynamic_batch else None
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
    except Exception as error:
        packed = _packed_into(model, example)
        if packed is not None:
            where = f"layer {packed!r} runs" if packed else "it runs"
            msg = f"{type(model).__name__} cannot be exported: {where} on packed sequences.{_PACKED_HINT}"
            raise ExportError(msg) from error
        words, hint = first_words(error), _read_hint(str(error))
        words = words.partition(" (unhinted")[0] if hint else words
        msg = f"{type(model).__name__} cannot be exported on inputs {describe_inputs(example)}: {words}.{hint}"
        if "register a pytree" in str(error):
            msg += _PYTREE_HINT
        elif dynamic_batch and not hint and "batch" in str(error):
            msg += _HINT
        raise ExportError(msg) from error


def _packed_into(model: nn.Module, inputs: Any) -> str | None:
    """Return the path of the innermost module that is given packed sequences; None where there is none."""
    found: list[str] = []

    def look(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(isinstance(value, PackedSequence) for value in (*args, *kwargs.values())):
            found.append(path)

    with ExitStack() as stack:
        for path, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                hook = partial(lambda path, _, args, kwargs: look(path, args, kwargs), path)
                stack.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        stack.enter_context(evaluating(model))
        with suppress(TenfoldError):  # the trouble is another
            call_model(model, inputs)
    return found[-1] if found else None


@contextmanager
def _keywords_by_name(model: nn.Module, kwargs: dict[str, Any]) -> Iterator[None]:
    """Have a forward with ``**kwargs`` name those it is given: torch.export fits no open axes onto ``**kwargs``."""
    forward = model.forward
    signature = inspect.signature(forward)
    fixed = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    more = [name for name in kwargs if name not in signature.parameters]
    if not more or len(fixed) == len(signature.parameters):
        yield
        return

    def named(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    keywords = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in more]
    named.__signature__ = signature.replace(parameters=[*fixed, *keywords])  # type: ignore[attr-defined]
    own = vars(model).get("forward")
    model.forward = named
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


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


def _read_hint(error: str) -> str:
    """Return where a forward goes by the value of a tensor, and what to do; nothing where that is not the trouble."""
    found = _READS.search(error)
    if found is None or "data-dependent" not in error:
        return ""
    where = f"{Path(found[1]).name}:{found[2]}{f' ({found[3]})' if found[3] else ''}"
    return f" The forward goes by a value at {where}: take it as an argument, computed outside."
