"""Refuse models with NaN or infinity before any work is done on them."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn

from tenfold.errors import WeightError


def check_finite(model: nn.Module, where: object = "the model") -> None:
    """Raise WeightError if a parameter or buffer holds NaN or infinity; the message names the tensor.

    Additive attention masks may: buffers of two or more dimensions that hold nothing but 0 and −∞. Tensors of other
    libraries that torch cannot look into are passed over.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> _ = net.bias.data.fill_(float("nan"))
        >>> check_finite(net)
        Traceback (most recent call last):
        tenfold.errors.WeightError: the model: 2 of the 2 numbers in bias are NaN or infinite. Repair them first.
    """
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta or nn.parameter.is_lazy(tensor) or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        try:
            bad = _not_finite(tensor.detach())
        except (NotImplementedError, RuntimeError, TypeError):  # such as a quantized tensor
            continue
        if bad and (isinstance(tensor, nn.Parameter) or not _is_mask(tensor)):
            msg = f"{where}: {bad} of the {tensor.numel()} numbers in {name} are NaN or infinite. Repair them first."
            raise WeightError(msg)


def _not_finite(tensor: Tensor) -> int:
    """Return how many numbers are not finite; where all are, which one sum tells, without a copy."""
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # of eight bits torch computes nothing
    if bool(torch.isfinite(wide.sum())):
        return 0
    return int((~torch.isfinite(wide)).sum())


def _is_mask(tensor: Tensor) -> bool:
    return tensor.dim() >= 2 and bool(((tensor == 0) | (tensor == -torch.inf)).all())
