"""Stacks of matrices whose matrices are layers: what stands for a parameter such as the weights of all experts."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tenfold.layers.matrices import Matrices


class Stack(nn.Module, abc.ABC):
    """A module with the face of a parameter (count, rows, columns): models compute with it as if it were one.

    Products with its matrices, one by one, picked by indices or grouped, go through ``multiply``, matrix by matrix;
    anything else is computed with ``dense``.
    """

    _is_hf_initialized = True  # as in ``LazyWeight``

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.full_shape = tuple(shape)

    @abc.abstractmethod
    def multiply(self, number: int, x: Tensor, *, turned: bool) -> Tensor:
        """Return x (..., k) times the matrix of this number, or times its transpose."""

    @abc.abstractmethod
    def dense(self) -> Tensor:
        """Return the whole parameter."""

    @property
    def tensor(self) -> Matrices:
        """The stack as a tensor."""
        like = next(self.parameters())
        return Matrices.picked(self, torch.arange(self.full_shape[0], device=like.device), like)

    def __getattr__(self, name: str) -> Any:
        """Return what a module does not have from the tensor: its shape, its transpose."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not hasattr(Tensor, name):
                raise
        return getattr(self.tensor, name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return what a function of torch returns for the tensor."""
        args, kwargs = tree_map_only(Stack, lambda stack: stack.tensor, (args, kwargs or {}))
        return func(*args, **kwargs)


def _of_tensor(name: str) -> Callable[..., Any]:
    """Return a method that does what a tensor's does."""

    def method(self: Stack, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.tensor, name)(*args, **kwargs)

    return method


# Operators are looked up on classes; and what both modules and parameters have means that of the parameter here.
for _name in (
    *("__getitem__", "__len__", "__iter__", "__matmul__", "__rmatmul__", "__neg__", "__pow__"),
    *(f"__{side}{what}__" for what in ("add", "sub", "mul", "truediv") for side in ("", "r")),
    *("to", "float", "double", "half", "bfloat16"),
):
    setattr(Stack, _name, _of_tensor(_name))


def stacked_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the module's own parameters, by name, that may stack matrices: those of three axes.

    Layers of torch and of tenfold have none that do.

    Example:
        >>> stacked_parameters(nn.Conv1d(2, 3, 4))
        {}
    """
    if type(module).__module__.startswith(("torch.", "tenfold.layers.")):
        return {}
    own = module.named_parameters(recurse=False)
    return {name: p for name, p in own if p.dim() == 3 and min(p.shape) > 1 and p.is_floating_point()}


class StackedLinear(Stack):
    """Linear layers 0, 1, 2 ... in place of a parameter (count, rows, columns) that holds their weights.

    Each runs on the rows that its matrix is multiplied with, and not at all where there are none: of a mixture of
    experts, on the tokens that are routed to it. So each is measured, and can be factorized, on its own. It runs the
    layers one after the other, which is slower than one grouped product.

    Args:
        weight: the parameter; each layer gets a copy of its matrix.
        transposed: whether the matrices are (in, out), not (out, in).

    Example:
        >>> weight, x = nn.Parameter(torch.randn(4, 3, 5)), torch.randn(7, 5)
        >>> stack = StackedLinear(weight)
        >>> torch.allclose(nn.functional.linear(x, stack[2]), nn.functional.linear(x, weight[2]), atol=1e-6)
        True
        >>> stack.get_submodule("2")
        Linear(in_features=5, out_features=3, bias=False)
    """

    def __init__(self, weight: Tensor, *, transposed: bool = False) -> None:
        super().__init__(weight.shape)
        self.transposed = transposed
        for number, matrix in enumerate(weight.detach()):
            own = matrix.mT if transposed else matrix
            layer = nn.Linear(own.shape[1], own.shape[0], bias=False, device="meta")
            layer.weight = nn.Parameter(own.clone(memory_format=torch.contiguous_format), weight.requires_grad)
            self.add_module(str(number), layer)

    def multiply(self, number: int, x: Tensor, *, turned: bool) -> Tensor:
        """Return what the layer makes of x, where that is the product; else compute with its weight."""
        layer: Any = self.get_submodule(str(number))
        made: Tensor = layer(x) if turned != self.transposed else x @ layer.weight
        return made

    def dense(self) -> Tensor:
        """Return the weights, factorized ones multiplied out; gradients flow through them."""
        layers: Any = self.children()
        weights = torch.stack([layer.weight for layer in layers])
        return weights.mT if self.transposed else weights

    def extra_repr(self) -> str:
        """Return the shape of the parameter."""
        return f"{self.full_shape}, transposed={self.transposed}"
