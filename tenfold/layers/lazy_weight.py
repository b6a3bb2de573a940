"""A weight that is multiplied out only if somebody computes with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

# What may be asked of a tensor that has no entries yet. Getters of properties are what torch hands over for them.
_KNOWN = {
    *(getattr(Tensor, name).__get__ for name in ("dtype", "device", "shape", "ndim", "is_cuda", "is_meta", "layout")),
    *(getattr(Tensor, name) for name in ("dim", "size", "numel", "is_floating_point", "is_complex", "__len__")),
}


class LazyWeight(Tensor):
    """A tensor that knows its shape, dtype and device, and is computed by ``make`` when anything else is wanted of it.

    Models ask layers for ``weight.dtype`` in every forward (ViT, T5, CLIP of transformers), which is not worth a
    product of all factors. Operations give plain tensors, and gradients flow as through what ``make`` returns.

    Example:
        >>> weight = LazyWeight.of((2, 3), torch.ones(1), lambda: torch.full((2, 3), 7.0))
        >>> weight.shape, weight.dtype
        (torch.Size([2, 3]), torch.float32)
        >>> weight.sum()
        tensor(42.)
    """

    _make: Callable[[], Tensor]
    _is_hf_initialized = True  # else transformers would fill it with random numbers when it loads a model

    @classmethod
    def of(cls, shape: tuple[int, ...], like: Tensor, make: Callable[[], Tensor]) -> Self:
        """Return a weight of this shape, in the dtype and on the device of ``like``, that ``make`` computes."""
        made: Self = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)  # noqa: SLF001
        made._make = make
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return what the function returns for the weight itself; what is known already costs nothing."""
        if func in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001
                return func(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(cls, lambda weight: weight._make(), (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Return the same for calls that come from below torch's Python functions."""
        args, kwargs = tree_map_only(cls, lambda weight: weight._make(), (args, kwargs or {}))
        return func(*args, **kwargs)
