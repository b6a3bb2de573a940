"""Feature maps of tensor networks: a number in 0..1 becomes a short vector, whose products the network weighs."""

from __future__ import annotations

from collections.abc import Callable
from math import pi

import torch
from torch import Tensor

from tenfold.errors import UnknownNameError, WeightError
from tenfold.registry import did_you_mean

FeatureMap = Callable[[Tensor], Tensor]


def trigonometric(x: Tensor) -> Tensor:
    """Return (..., 2): cos(πx/2) and sin(πx/2), of norm 1 (Stoudenmire & Schwab 2016, equation 3).

    Use it where overlaps are to be bounded by 1, as sweeps over sites want it.

    Example:
        >>> trigonometric(torch.tensor([0.0, 1.0])).round().abs().tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    return torch.stack([torch.cos(pi / 2 * x), torch.sin(pi / 2 * x)], -1)


def affine(x: Tensor) -> Tensor:
    """Return (..., 2): 1 − x and x, which sum to 1.

    Use it for training by gradients: a train of identities passes every input on unchanged, however many sites it has.

    Example:
        >>> affine(torch.tensor([0.25])).tolist()
        [[0.75, 0.25]]
    """
    return torch.stack([1 - x, x], -1)


def quadratic(x: Tensor) -> Tensor:
    """Return (..., 3): the Bernstein polynomials (1 − x)², 2x(1 − x) and x², which sum to 1.

    Use it where grey values matter by themselves; it costs half as much again as two features.

    Example:
        >>> quadratic(torch.tensor([0.5])).tolist()
        [[0.25, 0.5, 0.25]]
    """
    return torch.stack([(1 - x) ** 2, 2 * x * (1 - x), x**2], -1)


FEATURE_MAPS: dict[str, FeatureMap] = {"affine": affine, "quadratic": quadratic, "trigonometric": trigonometric}


def feature_map(named: str | FeatureMap) -> tuple[FeatureMap, int]:
    """Return a feature map, known by name or given as a function from (...) to (..., d), and its d.

    Use it to check a feature map of your own.

    Raises:
        UnknownNameError: an unknown name.
        WeightError: a function that does not append one axis.

    Example:
        >>> feature_map("quadratic")[1]
        3
    """
    if isinstance(named, str) and named not in FEATURE_MAPS:
        msg = f"unknown feature map {named!r}. {did_you_mean(named, FEATURE_MAPS)} Or pass a function."
        raise UnknownNameError(msg)
    found = FEATURE_MAPS[named] if isinstance(named, str) else named
    seen = found(torch.zeros(2, 1))
    if seen.shape[:-1] != (2, 1):
        msg = f"the feature map makes {tuple(seen.shape)} of (2, 1); it is to append one axis: (2, 1, features)"
        raise WeightError(msg)
    return found, seen.shape[-1]
