"""A weight that is multiplied out only if somebody computes with it, and that nobody can write to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tenfold.errors import WeightError
from tenfold.tensors import version_of

# What may be asked of a tensor that has no entries yet. Getters of properties are what torch hands over for them.
_KNOWN = {
    *(getattr(Tensor, name).__get__ for name in ("dtype", "device", "shape", "ndim", "is_cuda", "is_meta", "layout")),
    *(getattr(Tensor, name) for name in ("dim", "size", "numel", "is_floating_point", "is_complex", "__len__")),
}
# What would be lost with the product and that no count of versions shows; the setters of properties share one name.
_LOST = {"__set__", "set_", "requires_grad_", "register_hook", "register_post_accumulate_grad_hook", "retain_grad"}


class LazyWeight(Tensor):
    """A tensor that knows its shape, dtype and device, and is computed by ``make`` when anything else is wanted of it.

    Models ask layers for ``weight.dtype`` in every forward (ViT, T5, CLIP of transformers), which is not worth a
    product of all factors. Operations give plain tensors, and gradients flow as through what ``make`` returns.

    What is written to the product would be lost with it, so that this is an error, also by ``data``, ``detach()`` and
    other views: these are guarded alike.

    Example:
        >>> weight = LazyWeight.of((2, 3), torch.ones(1), lambda: torch.full((2, 3), 7.0))
        >>> weight.shape, weight.dtype
        (torch.Size([2, 3]), torch.float32)
        >>> weight.sum()
        tensor(42.)
        >>> weight.data.zero_()
        Traceback (most recent call last):
        tenfold.errors.WeightError: the weight of a factorized layer is computed from its factors...
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
        if getattr(func, "__name__", "") in _LOST:
            raise _computed_only()
        return cls._call(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Return the same for calls that come from below torch's Python functions."""
        return cls._call(func, args, kwargs or {})

    @classmethod
    def _call(cls, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Return what a function makes of the product, which it must not change; views of the product are guarded."""
        products: list[tuple[Tensor, int | None]] = []

        def product(weight: LazyWeight) -> Tensor:
            # Torch counts no versions of tensors that are made in inference mode.
            with torch.inference_mode(mode=False), torch.set_grad_enabled(grads):
                made = weight._make()
            products.append((made, version_of(made)))
            return made

        def guarded(result: Tensor) -> Tensor:
            if not any(_share_memory(result, made) for made, _ in products):
                return result
            return LazyWeight.of(tuple(result.shape), result, lambda: result)

        grads = torch.is_grad_enabled()
        args, kwargs = tree_map_only(cls, product, (args, kwargs))
        result = func(*args, **kwargs)
        if any(version_of(made) != version for made, version in products):
            raise _computed_only()
        return tree_map_only(Tensor, guarded, result)


def _share_memory(one: Tensor, other: Tensor) -> bool:
    try:
        return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    except RuntimeError:
        return False  # sparse tensors and those of torch.func have no storage


def _computed_only() -> WeightError:
    return WeightError(
        "the weight of a factorized layer is computed from its factors, so that what is written to it would be lost. "
        "Change the weights of layer.stages, or densify(model) first, or write to a copy: layer.weight.clone()"
    )
