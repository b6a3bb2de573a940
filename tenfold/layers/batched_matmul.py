"""Many small matrix products whose factors are picked from two tables, in blocks that stay in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Numbers per block in the largest of the arrays that a block goes through: a megabyte in float32. Larger ones leave the
# cache, and memory that is new to the process is several times slower than all that is computed in it.
_BLOCK = 262_144

# Products with fewer columns are slow: they are turned around.
NARROW = 16


def join(left: Tensor, right: Tensor) -> Tensor:
    """Return the products of many small matrices; torch is thrice as slow where the right ones have few columns."""
    return torch.bmm(right.mT, left.mT).mT if _turned(left, right) else torch.bmm(left, right)


def sum_of_terms(left: Tensor, right: Tensor) -> Tensor:
    """Return the products of (n, m, r) and (n, r, w), term by term: compiled, one loop with what picks them."""
    total = left[:, :, 0, None] * right[:, None, 0]
    for k in range(1, left.shape[2]):
        total = total + left[:, :, k, None] * right[:, None, k]
    return total


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
        for block in _blocks(out, i, j, left, right):
            place = block.rows.view(-1, rows, columns)
            if _turned(block.left, block.right):
                made = torch.bmm(block.right.mT, block.left.mT, out=block.room.view(-1, columns, rows))
                place.copy_(made.mT)
            else:
                torch.bmm(block.left, block.right, out=place)
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
        with torch.autocast(left.device.type, enabled=False):
            for block in _blocks(gradient, i, j, left, right):
                own = block.rows.reshape(-1, left.shape[1], right.shape[2])
                if for_left is not None:
                    for_left.index_add_(0, block.i, join(own, block.right.mT))
                if for_right is not None:
                    for_right.index_add_(0, block.j, join(block.left.mT, own))
        return for_left, for_right, None, None


class _Block(NamedTuple):
    """Some rows, what is picked for them, and room for as many numbers as the rows have."""

    rows: Tensor
    i: Tensor
    j: Tensor
    left: Tensor
    right: Tensor
    room: Tensor


def _blocks(rows: Tensor, i: Tensor, j: Tensor, left: Tensor, right: Tensor) -> Iterator[_Block]:
    """Yield all rows, block by block; each block is in the memory of the one before."""
    widest = max(rows.shape[1], left[0].numel(), right[0].numel())
    size = min(max(_BLOCK // widest, 1), max(len(i), 1))
    lefts, rights = left.new_empty(size, *left.shape[1:]), right.new_empty(size, *right.shape[1:])
    room = left.new_empty(size, rows.shape[1])
    for part, a, b in zip(rows.split(size), i.split(size), j.split(size), strict=True):
        one, other = lefts[: len(a)], rights[: len(b)]
        torch.index_select(left, 0, a, out=one)
        torch.index_select(right, 0, b, out=other)
        yield _Block(part, a, b, one, other, room[: len(a)])
