"""Example inputs of any structure: read their tensors, move them, pass them to a model."""

from __future__ import annotations

import dataclasses
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.utils.rnn import PackedSequence

from tenfold.errors import ProfileError, TenfoldError
from tenfold.records import Shape
from tenfold.tensors import digest, untransformed

# What torch says where a forward takes gradients under ``no_grad``.
_GRADIENTS = re.compile(r"requires?[_ ]grad|grad_fn|differentiated")


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Call the model on example inputs of any of the usual structures; except in training, on copies of them.

    Args:
        model: any callable module.
        inputs: a tensor (one argument), a tuple (the arguments; a last element that is a dict holds keyword arguments,
            as in ``torch.export``), exactly ``((args...), {kwargs})``, or a mapping (keyword arguments). Everything
            else, a list of tensors, a packed sequence or a named tuple for instance, is passed as one argument. To pass
            a dict as the last positional argument, put an empty one behind it.

    Raises:
        ProfileError: the forward fails; the message names the model, the shapes and the module that failed.

    Example:
        >>> call_model(nn.Bilinear(3, 4, 5), (torch.ones(2, 3), {"input2": torch.ones(2, 4)})).shape
        torch.Size([2, 5])
    """
    training = getattr(model, "training", False) and torch.is_grad_enabled()
    args, kwargs = arguments(writable(inputs) if training else own_copy(inputs))
    try:
        return model(*args, **kwargs)
    except TenfoldError:  # clear already, raised by a hook for instance
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or "no message"
        msg = (
            f"{type(model).__name__} does not run on inputs {describe_inputs(inputs)}{_place(model, error)}: "
            f"{type(error).__name__}: {reason[:500]}"
        )
        if not torch.is_grad_enabled() and _GRADIENTS.search(reason):
            msg += (
                " (tenfold runs models under torch.no_grad(); a forward that takes gradients itself has to compute "
                "what it differentiates within torch.enable_grad())"
            )
        if isinstance(inputs, list):
            msg += (
                " (a list is passed as one argument; give a tuple to pass its elements one by one, or its first alone "
                "if the rest are labels)"
            )
        if kwargs and "unexpected keyword argument" in reason:
            msg += " (a dict is passed as keyword arguments; to pass it as one, put an empty one behind it: (d, {}))"
        own = {p.dtype for p in model.parameters() if p.is_floating_point()}
        given = {t.dtype for t in tensors_in((args, kwargs)) if t.is_floating_point()}
        if len(own) == 1 and given and not given & own and "type" in reason.lower():
            msg += f" (the model is in {next(iter(own))}: give inputs in that type)"
        raise ProfileError(msg) from error


def _place(model: nn.Module, error: Exception) -> str:
    """Return in which module of the model an error was raised, for messages; empty for the model itself."""
    paths = {id(module): path for path, module in model.named_modules()}
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    found = [path for frame in frames if (path := paths.get(id(frame.f_locals.get("self"))))]
    return f", in layer {found[-1]!r}" if found else ""


def writable(inputs: Any) -> Any:
    """Return the inputs; if some were made in inference mode, copies that can be trained through and written to."""
    if not any(tensor.is_inference() for tensor in tensors_in(arguments(inputs))):
        return inputs
    return map_tensors(inputs, lambda tensor: tensor.clone() if tensor.is_inference() else tensor)


def own_copy(inputs: Any) -> Any:
    """Return a copy of the inputs, which a forward may change in place; what is the same tensor stays the same."""
    copies: dict[int, Tensor] = {}

    def copied(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            new = tensor.clone()
            copies[id(tensor)] = new.requires_grad_() if tensor.requires_grad and not new.requires_grad else new
        return copies[id(tensor)]

    return map_tensors(inputs, copied)


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split inputs into the positional and keyword arguments that ``call_model`` passes."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if not isinstance(inputs, tuple) or hasattr(inputs, "_fields"):
        return (inputs,), {}
    if len(inputs) == 2 and isinstance(inputs[0], tuple) and isinstance(inputs[1], Mapping):
        return (inputs[0] if not hasattr(inputs[0], "_fields") else (inputs[0],)), dict(inputs[1])
    if inputs and isinstance(inputs[-1], Mapping):
        return inputs[:-1], dict(inputs[-1])
    return inputs, {}


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Iterate over the tensors in nested tuples, lists, mappings, packed sequences, dataclasses and distributions."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors_in(value)
    elif isinstance(tree, PackedSequence):
        yield tree.data
    elif isinstance(tree, tuple | list):
        for value in tree:
            yield from tensors_in(value)
    else:
        for value in _fields(tree):
            yield from tensors_in(value)


def _fields(tree: Any) -> Iterable[Any]:
    if isinstance(tree, Distribution):
        return {id(value): value for value in vars(tree).values()}.values()  # some keep a parameter twice
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return [getattr(tree, field.name, None) for field in dataclasses.fields(tree)]
    return ()


def digest_batches(batches: Iterable[Any]) -> str:
    """Return a digest of batches of inputs, of every bit of their tensors in order.

    Example:
        >>> digest_batches([torch.zeros(2, 3)]) == digest_batches([{"x": torch.zeros(2, 3)}])
        True
        >>> digest_batches([torch.zeros(2, 3)]) == digest_batches([torch.zeros(1, 3)] * 2)
        False
    """
    each = (digest({str(i): t for i, t in enumerate(tensors_in(arguments(batch)))}) for batch in batches)
    return digest({}, "".join(each))


def map_tensors(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return the tree with every tensor replaced by ``change(tensor)``; non-container values are returned unchanged."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        return {key: map_tensors(value, change) for key, value in tree.items()}
    if isinstance(tree, PackedSequence):
        return tree._replace(data=change(tree.data))
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(value, change) for value in tree))
    if isinstance(tree, tuple | list):
        return type(tree)(map_tensors(value, change) for value in tree)
    return tree


def to_device(inputs: Any, device: torch.device | str, dtype: torch.dtype | None = None) -> Any:
    """Move all tensors of the inputs to ``device``, and floating point ones to ``dtype`` if one is given.

    Example:
        >>> to_device({"ids": torch.zeros(2, dtype=torch.long), "x": torch.ones(2)}, "cpu", torch.float64)["x"].dtype
        torch.float64
    """
    inputs = writable(inputs)
    if isinstance(inputs, PackedSequence):
        moved: Any = inputs
        moved = moved.to(torch.device(device))
        return moved if dtype is None else moved.to(dtype)

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

    return map_tensors(inputs, move)


def batch_size_of(inputs: Any) -> int | None:
    """Return the batch size: the first axis of the first tensor, the length of a list, or None if there is neither.

    Example:
        >>> batch_size_of((torch.zeros(8, 3), {"mask": torch.zeros(8)}))
        8
    """
    args, kwargs = arguments(inputs)
    if len(args) == 1 and isinstance(args[0], list):
        return len(args[0])
    if args and isinstance(args[0], PackedSequence):
        return int(args[0].batch_sizes[0])
    first = next(tensors_in((*args, kwargs)), None)
    return int(first.shape[0]) if first is not None and first.dim() else None


def input_shapes(inputs: Any) -> tuple[Shape, ...]:
    """Return the shapes of all tensors in the inputs, in order."""
    return tuple(shape_of(tensor) for tensor in tensors_in(arguments(inputs)))


def shape_of(tensor: Tensor) -> Shape:
    """Return the shape as a plain tuple, with the axes of ``vmap``; empty for nested tensors, which have none."""
    return () if tensor.is_nested else tuple(int(n) for n in untransformed(tensor).shape)


def describe_inputs(inputs: Any) -> str:
    """Describe the shapes and dtypes of the inputs, for messages."""
    args, kwargs = arguments(inputs)
    parts = [_in_words(a) for a in args] + [f"{k}={_in_words(v)}" for k, v in kwargs.items()]
    return f"({', '.join(parts)})"


def _in_words(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(shape_of(value))}"
    if isinstance(value, tuple | list) and not isinstance(value, PackedSequence):
        return f"{type(value).__name__} of {len(value)} ({', '.join(_in_words(v) for v in value[:3])})"
    return type(value).__name__
