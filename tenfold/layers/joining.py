"""Many small matrix products whose factors are picked from two tables, in blocks that stay in the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Numbers per block in each of the arrays that a block goes through: half a megabyte in float32.
_BLOCK = 131_072

# Products with fewer columns are slow: they are turned around.
NARROW = 16


def join(left: Tensor, right: Tensor) -> Tensor:
    """Return the products of many small matrices; torch is thrice as slow where the right ones have few columns."""
    return torch.bmm(right.mT, left.mT).mT if _turned(left, right) else torch.bmm(left, right)


def _turned(left: Tensor, right: Tensor) -> bool:
    return right.shape[-1] < NARROW <= left.shape[1]


class JoinPicked(torch.autograd.Function):
    """Row n of the result is left[i[n]] @ right[j[n]], flat, for tables (a, m, r) and (b, r, w).

    Neither the picked factors nor their gradients are ever held for all rows: they are picked again on the way back.
    """

    @staticmethod
    def forward(left: Tensor, right: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Return (n, m·w)."""
        rows, columns = left.shape[1], right.shape[2]
        out = left.new_empty(len(i), rows * columns)
        for part, a, b in _blocks(out, i, j, left, right):
            place, one, other = part.view(len(a), rows, columns), left.index_select(0, a), right.index_select(0, b)
            if _turned(one, other):
                place.copy_(join(one, other))
            else:
                torch.bmm(one, other, out=place)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep the tables and what is picked from them."""
        del output
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Return the gradients of both tables."""
        left, right, i, j = ctx.saved_tensors
        wants_left, wants_right, _, _ = ctx.needs_input_grad
        for_left = torch.zeros_like(left, memory_format=torch.contiguous_format) if wants_left else None
        for_right = torch.zeros_like(right, memory_format=torch.contiguous_format) if wants_right else None
        for part, a, b in _blocks(gradient, i, j, left, right):
            own = part.reshape(len(a), left.shape[1], right.shape[2])
            if for_left is not None:
                for_left.index_add_(0, a, join(own, right.index_select(0, b).mT))
            if for_right is not None:
                for_right.index_add_(0, b, join(left.index_select(0, a).mT, own))
        return for_left, for_right, None, None


def _blocks(rows: Tensor, i: Tensor, j: Tensor, left: Tensor, right: Tensor) -> zip[tuple[Tensor, Tensor, Tensor]]:
    widest = max(rows.shape[1], left[0].numel(), right[0].numel())
    size = max(_BLOCK // widest, 1)
    return zip(rows.split(size), i.split(size), j.split(size), strict=True)
