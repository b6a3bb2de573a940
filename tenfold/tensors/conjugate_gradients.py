"""Preconditioned conjugate gradients for a batch of linear least-squares problems whose matrices are never formed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]


def conjugate_gradients(
    normal: Map,
    right: Tensor,
    start: Tensor,
    *,
    steps: int,
    precondition: Map | None = None,
    enough: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return x (batch, ...) some steps nearer to the solution of G(x) = right, and what is missing: right − G(x).

    Hestenes & Stiefel 1952. Problems of the batch that are solved, or singular where they stand, stay as they are.

    Args:
        normal: the map G, symmetric and positive semidefinite for each of the batch.
        right: (batch, ...).
        start: x to begin with.
        steps: at most.
        precondition: near to the inverse of G, likewise symmetric; none by default.
        enough: (batch,) stop when the squared (preconditioned) residuals of all are at most this.

    Example:
        >>> g = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> x, missing = conjugate_gradients(lambda x: x @ g, torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2), steps=2)
        >>> [round(v, 3) for v in x[0].tolist()], bool(missing.abs().max() < 1e-6)
        ([0.6, -0.2], True)
    """
    x, residual = start, right - normal(start)
    direction = z = residual if precondition is None else precondition(residual)
    rho = dot(residual, z)
    for _ in range(steps):
        if enough is not None and bool((rho <= enough).all()):
            break
        image = normal(direction)
        step = each(ratio(rho, dot(direction, image)), x)
        x, residual = x + step * direction, residual - step * image
        z = residual if precondition is None else precondition(residual)
        new = dot(residual, z)
        direction, rho = z + each(ratio(new, rho), x) * direction, new
    return x, residual


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner products (batch,)."""
    product: Tensor = (a * b).flatten(1).sum(-1)
    return product


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """Return a/b, and 0 where b is not positive."""
    return torch.where(b > 0, a / torch.where(b > 0, b, torch.ones_like(b)), torch.zeros_like(a))


def each(values: Tensor, like: Tensor) -> Tensor:
    """Return one number for each of a batch (batch,) in a shape that goes with ``like``."""
    return values.reshape(-1, *(1,) * (like.dim() - 1))
