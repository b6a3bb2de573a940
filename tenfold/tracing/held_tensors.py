"""Tensors that modules hold, as parameters, buffers or attributes: without inference mode, and without graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from tenfold.tracing.inputs import map_tensors, tensors_in

M = TypeVar("M", bound=nn.Module)


def without_graphs(model: nn.Module) -> dict[int, Any]:
    """Return what stands in a deep copy, by ``id``, for tensors that a forward has kept with their graph."""
    return {id(t): t.detach().clone() for t in held_tensors(model) if t.grad_fn is not None}


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


def held_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Iterate over the tensors that the modules of a model hold in any attribute."""
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
