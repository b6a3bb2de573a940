"""Fingerprints of tensors, and the count of their changes in place."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """Return a fingerprint of tensors, by name, dtype, shape and every bit, and of a text.

    Example:
        >>> digest({"a": torch.zeros(2)}) == digest({"a": torch.zeros(2)}) != digest({"a": -torch.zeros(2)})
        True
    """
    found = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def version_of(tensor: Tensor) -> int | None:
    """Return how often the tensor was changed in place; None where torch does not count."""
    return None if tensor.is_inference() else tensor._version  # noqa: SLF001 - torch's own count
