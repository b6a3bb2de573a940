"""Which tokens of a batch are real and which are padding, as the masks among its inputs say."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.tracing.inputs import arguments

# What additive masks hold in place of -inf, in the lowest dtypes too.
_BLOCKED = -1e3

# Names of masks, and whether True stands for padding in them, as in ``nn.MultiheadAttention``.
_NAMES = {"attention_mask": False, "key_padding_mask": True, "src_key_padding_mask": True, "padding_mask": True}


def token_mask(inputs: Any, model: nn.Module | None = None) -> Tensor | None:
    """Return a boolean mask (batch, sequence) of real tokens, or None if the inputs have none that is understood.

    It is read from ``attention_mask`` as transformers take it, where 0 and False are padding, or from the masks of
    ``nn.MultiheadAttention``, ``key_padding_mask`` and ``src_key_padding_mask``, where True is. Any of them may be
    additive instead: 0 for what is real, -inf or a large negative number for padding. Of a mask (batch, queries, keys)
    or (batch, heads, queries, keys) the keys count that some query sees.

    Args:
        inputs: a batch as ``call_model`` takes it.
        model: whose forward names the positional arguments; without, only keywords are looked at.

    Example:
        >>> token_mask({"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.tensor([[1, 1, 0]])})
        tensor([[ True,  True, False]])
        >>> token_mask({"x": torch.ones(1, 3, 8), "attention_mask": torch.tensor([[0, 0, -torch.inf]])})
        tensor([[ True,  True, False]])
    """
    named = _by_name(inputs, model)
    for name, padding_is_true in _NAMES.items():
        mask = named.get(name)
        if isinstance(mask, Tensor) and not mask.is_nested and 2 <= mask.dim() <= 4:
            seen = _seen(mask, padding_is_true=padding_is_true)
            return None if seen is None else _keys(seen)
    return None


def real_tokens(values: Tensor, mask: Tensor | None, *, features: bool = True) -> Tensor:
    """Select the rows (n, ...) of values (batch, sequence, ...) at real tokens.

    Values (sequence, batch, ...) are understood as well. Without a mask, or if the leading axes are not those of the
    mask, the values are returned unchanged.

    Args:
        values: ids (batch, sequence), or with ``features`` the input of a layer (batch, sequence, n).
        mask: see ``token_mask``; one for all samples has a batch of 1.
        features: whether the values have an axis of features.
    """
    real = real_places(values, mask, features=features)
    return values if real is None else values[real]


def real_places(values: Tensor, mask: Tensor | None, *, features: bool = True) -> Tensor | None:
    """Return a mask over the first two axes of values, true at real tokens; None where all count."""
    if mask is None or values.dim() != 2 + features:
        return None
    for real in (mask, mask.expand(values.shape[0], -1) if len(mask) == 1 else mask, mask.t()):
        if values.shape[:2] == real.shape:
            return real.to(values.device)
    return None


def _by_name(inputs: Any, model: nn.Module | None) -> dict[str, Any]:
    """Return the arguments of the model's forward by name, as far as they have one."""
    args, kwargs = arguments(inputs)
    if model is None or not args:
        return kwargs
    try:
        return {**inspect.signature(model.forward).bind_partial(*args).arguments, **kwargs}
    except (TypeError, ValueError):  # a forward without a signature, of scripted modules for instance
        return kwargs


def _seen(mask: Tensor, *, padding_is_true: bool) -> Tensor | None:
    """Return what a mask lets through, as booleans; None for a bias that masks nothing out."""
    if mask.dtype == torch.bool:
        return ~mask if padding_is_true else mask
    if not mask.is_floating_point():
        return mask == 0 if padding_is_true else mask != 0
    blocked = mask <= _BLOCKED
    if bool(((mask == 0) | blocked).all()):
        return ~blocked
    if bool(((mask == 0) | (mask == 1)).all()):
        return mask == 0 if padding_is_true else mask == 1
    return None


def _keys(seen: Tensor) -> Tensor | None:
    """Return which keys are real (batch, keys), given which of them are seen; None if that is not known."""
    if seen.dim() == 2:
        return None if _is_causal(seen) else seen
    if seen.dim() == 4:
        seen = seen.any(1)
    queries, keys = seen.shape[-2:]
    if queries == keys and not bool((seen.diagonal(dim1=1, dim2=2) | ~seen.any(1)).all()):
        return None  # tokens that others see and that do not see themselves: True may stand for what is masked out
    return seen.any(1)


def _is_causal(seen: Tensor) -> bool:
    """Whether a mask is (queries, keys) of one sequence, each of which sees itself and what came before."""
    square = len(seen) == seen.shape[1] > 1
    return square and bool(seen.tril().equal(seen) and seen.tril().sum() == len(seen) * (len(seen) + 1) // 2)
