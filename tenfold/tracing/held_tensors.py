"""Tensors that modules hold, as parameters, buffers or attributes: without inference mode, and without graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from tenfold.tracing.inputs import map_tensors, tensors_in

M = TypeVar("M", bound=nn.Module)


def copied(model: M) -> M:
    """Return a deep copy, in which tensors that a forward has kept with their graph are without it.

    What was made in inference mode is a normal tensor in the copy.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 2)
        >>> model.last = model(torch.ones(1, 2))  # copy.deepcopy refuses it
        >>> copied(model).last.requires_grad
        False
    """
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in _held(model) if t.grad_fn is not None}
    with torch.no_grad():  # else parameters of scripted parts are copied with a graph, and cannot be trained
        made = copy.deepcopy(model, memo)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in made.named_parameters():
        if name in trained:
            parameter.requires_grad_()
    return made


def trainable_copy(model: M) -> M:
    """Return the model, or a copy if it holds tensors that were made in inference mode: no gradient passes them."""
    return copied(model) if any(t.is_inference() for t in _held(model)) else model


def leave_inference_(model: M) -> M:
    """Put normal tensors in place of those that were made in inference mode, which cannot be written to."""
    known: dict[int, Tensor] = {}

    def normal(tensor: Tensor) -> Tensor:
        if not tensor.is_inference():
            return tensor
        if id(tensor) not in known:
            value = tensor.detach().clone()
            known[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
        return known[id(tensor)]

    _change(model, normal)
    return model


def drop_graphs(model: nn.Module) -> None:
    """Detach what a forward has kept on modules from the graph of its gradients."""
    _change(model, lambda tensor: tensor if tensor.grad_fn is None else tensor.detach())


def _held(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        yield from (
            t for t in tensors_in(vars(module)) if not isinstance(t, UninitializedParameter | UninitializedBuffer)
        )


def _change(model: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    for module in model.modules():
        _change_within(vars(module), change)


def _change_within(holder: Any, change: Callable[[Tensor], Tensor]) -> None:
    """Replace tensors in a dictionary or list, and in those within it, where that changes them."""
    for key, value in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
        if isinstance(value, dict | list):
            _change_within(value, change)
        elif any(change(tensor) is not tensor for tensor in tensors_in(value)):
            holder[key] = map_tensors(value, change)
