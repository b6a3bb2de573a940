"""Tensor rings as parts: each core as the best one between its neighbours, for white inputs or under the data."""

from __future__ import annotations

import torch
from torch import Tensor

from tenfold.decompositions.parts import DIRECT, Parts, solve, solve_by_steps
from tenfold.decompositions.parts_under import Layout
from tenfold.tensors import rings


class Rings:
    """A batch of tensors (batch, *modes) to meet by rings of three cores (batch, r, n, r') and more."""

    def __init__(self, tensor: Tensor) -> None:
        self.power = tensor.flatten(1).square().sum(-1)
        order = tensor.dim() - 1
        self._turned = []
        for k in range(order):  # modes k−1 and k, and those that follow around the ring
            axes = [(k + step) % order + 1 for step in range(-1, order - 1)]
            self._turned.append(tensor.permute(0, *axes).flatten(3).contiguous())

    def sweep(self, parts: Parts) -> tuple[Parts, Tensor]:
        """Return each core in turn as the best one between its neighbours, and the squared errors then."""
        cores, found = list(parts), self.power
        for k in range(len(cores)):
            left, right = beside(cores, k)
            cores[k], found = _best(self._turned[k], left, right, cores[k])
        return tuple(cores), (self.power + found).clamp_min(0)


class RingLayout(Layout):
    """Rings of the modes (out, K, in), or (q, p, i₁, i₂) of linear layers: see the format ``tensor_ring``."""

    def __init__(self, order: int) -> None:
        self.outer = order - 2
        self._plain = order == 4  # a linear layer

    def left(self, parts: Parts) -> Tensor:
        """Return A (batch, out, r·r')."""
        if not self._plain:
            return parts[0].transpose(1, 2).flatten(2)
        return torch.einsum("zaqb,zbpc->zpqac", parts[0], parts[1]).flatten(3).flatten(1, 2)

    def right(self, parts: Parts) -> Tensor:
        """Return Y (batch, r·r', n)."""
        middle, last = parts[-2:]
        if self._plain:
            return torch.einsum("zcid,zdja->zacij", middle, last).flatten(3).flatten(1, 2)
        return torch.einsum("zbkc,zcia->zabik", middle, last).flatten(3).flatten(1, 2)

    def seen(self, product: Tensor, parts: Parts, k: int) -> Tensor:
        """Return the adjoint of ``left`` or ``right`` as a map of core k."""
        middle, last = parts[-2:]
        if not self._plain:
            (_, out, b), (a, taps, inner) = parts[0].shape[1:], (last.shape[3], middle.shape[2], last.shape[2])
            if k == 0:
                return product.reshape(-1, out, a, b).transpose(1, 2)
            apart = product.reshape(-1, a, b, inner, taps)
            equation, other = ("zabik,zcia->zbkc", last) if k == 1 else ("zabik,zbkc->zcia", middle)
            return torch.einsum(equation, apart, other)
        a, c = last.shape[3], middle.shape[1]
        if k < self.outer:
            apart = product.reshape(-1, parts[1].shape[2], parts[0].shape[2], a, c)
            equation, other = ("zpqac,zbpc->zaqb", parts[1]) if k == 0 else ("zpqac,zaqb->zbpc", parts[0])
        else:
            apart = product.reshape(-1, a, c, middle.shape[2], last.shape[2])
            equation, other = ("zacij,zdja->zcid", last) if k == self.outer else ("zacij,zcid->zdja", middle)
        return torch.einsum(equation, apart, other)

    def gram(self, parts: Parts, k: int) -> Tensor | None:
        """Return the Gram matrix of what is beside core k."""
        left, right = beside(parts, k)
        return gram_between(left, right) if left.shape[3] * right.shape[1] <= DIRECT else None

    def columns(self, part: Tensor) -> Tensor:
        """Return a core (batch, r, n, r') as (batch, r·r', n)."""
        return part.transpose(2, 3).flatten(1, 2)

    def uncolumns(self, columns: Tensor, like: Tensor) -> Tensor:
        """Return (batch, r·r', n) as a core."""
        return columns.reshape(len(like), like.shape[1], like.shape[3], -1).transpose(2, 3)

    def along_inputs(self, parts: Parts, matrices: tuple[Tensor, ...]) -> Parts:
        """Return the ring with matrices multiplied to the modes of the last two cores."""
        first, second = matrices if self._plain else reversed(matrices)  # the flattened weight has (in, K)
        return *parts[:-2], first[:, None] @ parts[-2], second[:, None] @ parts[-1]


def beside(cores: Parts | list[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Return the core before core k, and the one that all others after it multiply to."""
    order = len(cores)
    return cores[k - 1], rings.tr_chain(tuple(cores[(k + step) % order] for step in range(1, order - 1)))


def gram_between(left: Tensor, right: Tensor) -> Tensor:
    """Return the matrix (batch, b·c, b·c) of the normal equations of a core between (a, l, b) and (c, r, a)."""
    of_left, of_right = _overlap(left), _overlap(right)
    b, c = left.shape[3], right.shape[1]
    pairs = of_left.permute(0, 2, 4, 1, 3).flatten(3).flatten(1, 2)  # (bb', aa')
    others = of_right.permute(0, 2, 4, 1, 3).flatten(3).flatten(1, 2)  # (aa', cc')
    return (pairs @ others).reshape(-1, b, b, c, c).transpose(2, 3).reshape(-1, b * c, b * c)


def _overlap(core: Tensor) -> Tensor:
    """Return the inner products (batch, r, r', r, r') of the fibers of a core (batch, r, n, r')."""
    flat = core.transpose(1, 2).flatten(2)
    return (flat.mT @ flat).reshape(-1, core.shape[1], core.shape[3], core.shape[1], core.shape[3])


def _best(tensor: Tensor, left: Tensor, right: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """Return the core (batch, b, n, c) with the least error, and that error less the power of the tensors."""
    b, c = held.shape[1], held.shape[3]
    seen = _seen(tensor, left, right).transpose(2, 3).flatten(1, 2)  # (batch, bc, n)
    start = held.transpose(2, 3).flatten(1, 2)
    if b * c <= DIRECT:
        x, found = solve(gram_between(left, right), seen, start)
        return x.unflatten(1, (b, c)).transpose(2, 3), found
    a = left.shape[1]
    by_left = _overlap(left).permute(0, 1, 3, 4, 2).flatten(1, 3)  # (aa'b', b)
    by_right = _overlap(right).permute(0, 2, 4, 1, 3).flatten(1, 3)  # (aa'c, c')

    def product(x: Tensor) -> Tensor:
        moved = (by_left @ x.reshape(len(x), b, -1)).reshape(len(x), a * a, b, c, -1)
        gathered = moved.permute(0, 2, 4, 1, 3).reshape(len(x), -1, a * a * c) @ by_right
        return gathered.reshape(len(x), b, -1, c).transpose(2, 3).flatten(1, 2)

    x, found = solve_by_steps(product, seen, start)
    return x.unflatten(1, (b, c)).transpose(2, 3), found


def _seen(tensor: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return the tensors (batch, l, n, r) between their neighbours' cores, in the cheaper order: (batch, b, n, c)."""
    batch, rows, n, columns = tensor.shape
    a, b, c = left.shape[1], left.shape[3], right.shape[1]
    if rows * c * (columns + b) <= columns * b * (rows + c):
        flat = right.transpose(1, 2).flatten(2)  # (r, ca)
        half = (tensor.flatten(1, 2) @ flat).reshape(batch, rows, n, c, a)
        half = half.permute(0, 1, 4, 2, 3).reshape(batch, rows * a, n * c)
        return (left.transpose(1, 2).flatten(1, 2).mT @ half).reshape(batch, b, n, c)
    flat = left.transpose(1, 2).flatten(2)  # (l, ab)
    half = (flat.mT @ tensor.flatten(2)).reshape(batch, a, b, n, columns)
    half = half.permute(0, 2, 3, 1, 4).reshape(batch, b * n, a * columns)
    return (half @ right.permute(0, 3, 2, 1).flatten(1, 2)).reshape(batch, b, n, c)
