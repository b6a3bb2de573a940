"""Updates of tensor rings: each core as the best one between its neighbours, for white inputs or under the data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold.decompositions.block_als.descent import DIRECT, Blocks, solve, solve_by_steps
from tenfold.decompositions.block_als.weighted_descent import Layout
from tenfold.tensors import rings
from tenfold.tensors.conjugate_gradients import Map, dot, each


class RingLeastSquares:
    """A batch of tensors (batch, *modes) to approximate by rings of three cores (batch, r, n, r') and more.

    The terms are those of the closing bond: one for each of its r₁ values.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.power = tensor.flatten(1).square().sum(-1)
        self._turned = []
        order = tensor.dim() - 1
        for k in range(order):
            before, after = _around(order, k)
            turned = tensor.permute(0, *(m + 1 for m in (*before, k, *after)))
            self._turned.append(turned.flatten(1, len(before)).flatten(3).contiguous())

    def sweep(self, blocks: Blocks, ridge: Tensor) -> tuple[Blocks, Tensor, Tensor]:
        """Return each core in turn as the best one between its neighbours.

        And the squared errors then, and the sums of the terms' squares.
        """
        cores, lower, terms = list(blocks), self.power, self.power
        for k, tensor in enumerate(self._turned):
            left, right = beside(cores, k)
            between = Between(_others(cores, k), left, right, closing=_closing(len(cores), k), ridge=ridge)
            cores[k], lower, terms = between.best(tensor, cores[k])
        return tuple(cores), (self.power + lower - ridge * terms).clamp_min(0), terms


class RingLayout(Layout):
    """Rings of the modes (out, K, in), or (q, p, i₁, i₂) of linear layers: see the format ``tensor_ring``."""

    def __init__(self, order: int) -> None:
        self.outer = order - 2
        self._plain = order == 4  # a linear layer

    def left(self, blocks: Blocks) -> Tensor:
        """Return A (batch, out, r·r')."""
        if not self._plain:
            return blocks[0].transpose(1, 2).flatten(2)
        return torch.einsum("zaqb,zbpc->zpqac", blocks[0], blocks[1]).flatten(3).flatten(1, 2)

    def right(self, blocks: Blocks) -> Tensor:
        """Return Y (batch, r·r', n)."""
        middle, last = blocks[-2:]
        if self._plain:
            return torch.einsum("zcid,zdja->zacij", middle, last).flatten(3).flatten(1, 2)
        return torch.einsum("zbkc,zcia->zabik", middle, last).flatten(3).flatten(1, 2)

    def adjoint(self, product: Tensor, blocks: Blocks, k: int) -> Tensor:
        """Return the adjoint of ``left`` or ``right`` as a map of core k."""
        middle, last = blocks[-2:]
        if not self._plain:
            (_, out, b), (a, taps, inner) = blocks[0].shape[1:], (last.shape[3], middle.shape[2], last.shape[2])
            if k == 0:
                return product.reshape(-1, out, a, b).transpose(1, 2)
            apart = product.reshape(-1, a, b, inner, taps)
            equation, other = ("zabik,zcia->zbkc", last) if k == 1 else ("zabik,zbkc->zcia", middle)
            return torch.einsum(equation, apart, other)
        a, c = last.shape[3], middle.shape[1]
        if k < self.outer:
            apart = product.reshape(-1, blocks[1].shape[2], blocks[0].shape[2], a, c)
            equation, other = ("zpqac,zbpc->zaqb", blocks[1]) if k == 0 else ("zpqac,zaqb->zbpc", blocks[0])
        else:
            apart = product.reshape(-1, a, c, middle.shape[2], last.shape[2])
            equation, other = ("zacij,zdja->zcid", last) if k == self.outer else ("zacij,zcid->zdja", middle)
        return torch.einsum(equation, apart, other)

    def gram(self, blocks: Blocks, k: int) -> Tensor | None:
        """Return the Gram matrix of what is beside core k."""
        small = blocks[k].shape[1] * blocks[k].shape[3] <= DIRECT
        return gram_around(_others(blocks, k)) if small else None

    def columns(self, block: Tensor) -> Tensor:
        """Return a core (batch, r, n, r') as (batch, r·r', n)."""
        return _columns(block)

    def uncolumns(self, columns: Tensor, like: Tensor) -> Tensor:
        """Return (batch, r·r', n) as a core."""
        return columns.reshape(len(like), like.shape[1], like.shape[3], -1).transpose(2, 3)

    def along_inputs(self, blocks: Blocks, matrices: tuple[Tensor, ...]) -> Blocks:
        """Return the ring with matrices multiplied to the modes of the last two cores."""
        first, second = matrices if self._plain else reversed(matrices)  # the flattened weight has (in, K)
        return *blocks[:-2], first[:, None] @ blocks[-2], second[:, None] @ blocks[-1]


def beside(cores: Blocks | list[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Return what the cores on both sides of core k multiply to, (a, l, b) and (c, r, a)."""
    before, after = _around(len(cores), k)
    return rings.tr_chain(tuple(cores[m] for m in before)), rings.tr_chain(tuple(cores[m] for m in after))


def _others(cores: Blocks | list[Tensor], k: int) -> Blocks:
    """Return the cores around the ring from the one after core k to the one before."""
    return (*cores[k + 1 :], *cores[:k])


def _around(order: int, k: int) -> tuple[range, range]:
    """Return which cores stand before core k and which after: the closing bond is never within either."""
    if k == 0:
        return range(order - 1, order), range(1, order - 1)
    if k == order - 1:
        return range(1, order - 1), range(1)
    return range(k), range(k + 1, order)


def _closing(order: int, k: int) -> str:
    """Return which bond of a core between (a, l, b) and (c, r, a) is the closing one."""
    return "b" if k == 0 else "c" if k == order - 1 else "a"


def gram_around(others: Blocks) -> Tensor:
    """Return the matrix (batch, b·c, b·c) of the normal equations of a core whose left rank is b and right rank is c.

    ``others`` are the other cores, from the right neighbour (c, n, r) around to the left one (r', n, b). Core after
    core is multiplied to the inner products of those so far, from one end, the other, or both until they meet: whatever
    multiplies least, for products of fibers may be far larger than the cores.
    """
    mirrored = tuple(core.permute(0, 3, 2, 1) for core in reversed(others))
    count = len(others)
    (c, *_), (b, *_) = others[0].shape[1:], mirrored[0].shape[1:]

    def cost(first: int) -> int:
        meeting = (b * c * others[first].shape[1]) ** 2 if 0 < first < count else 0
        return _cost_of_products(others[:first]) + _cost_of_products(mirrored[: count - first]) + meeting

    first = min(range(count + 1), key=cost)
    if first == 0:
        whole = _products(mirrored).permute(0, 1, 3, 2, 4)
    elif first == count:
        whole = _products(others).permute(0, 3, 1, 4, 2)
    else:
        left, right = _products(mirrored[: count - first]), _products(others[:first])  # (b, b', a, a'), (c, c', a, a')
        met = left.flatten(3).flatten(1, 2) @ right.flatten(3).flatten(1, 2).mT
        whole = met.reshape(-1, b, b, c, c).transpose(2, 3)
    return whole.reshape(-1, b * c, b * c)


def _products(cores: Blocks) -> Tensor:
    """Return the inner products (batch, c, c', r, r') of the fibers of the core that neighbours multiply to."""
    first, *others = cores
    c = first.shape[1]
    found = _overlap(first).permute(0, 1, 3, 2, 4)
    for core in others:
        batch, inside, n, outside = core.shape
        half = found.reshape(batch, -1, inside) @ core.flatten(2)  # (cc'r, n·s')
        half = half.reshape(batch, c * c, inside * n, outside).transpose(2, 3).reshape(batch, -1, inside * n)
        found = (half @ core.flatten(1, 2)).reshape(batch, c, c, outside, outside).transpose(3, 4)
    return found


def _cost_of_products(cores: Blocks) -> int:
    """Return the multiplications of ``_products``."""
    if not cores:
        return 0
    c = cores[0].shape[1]
    sizes = [core.shape[1:] for core in cores[1:]]
    return cores[0][0].numel() * c * cores[0].shape[3] + sum(c * c * r * n * s * (r + s) for r, n, s in sizes)


@dataclass(frozen=True, eq=False)
class Between:
    """A core (batch, b, n, c) between its neighbours (batch, a, l, b) and (batch, c, r, a).

    ``others`` are the cores of which these are made: see ``gram_around``. ``closing`` names the bond whose
    values are the terms, and ``ridge`` is the weight of their squares.
    """

    others: Blocks
    left: Tensor
    right: Tensor
    closing: str
    ridge: Tensor

    def best(self, tensor: Tensor, held: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the best core for tensors (batch, l, n, r), the objective less their power, and the terms' squares."""
        b, c = held.shape[1], held.shape[3]
        between = _contracted(tensor, self.left, self.right)  # (batch, b, n, c)
        if self.closing != "a" or b * c <= DIRECT:
            gram = gram_around(self.others)
            within = self._within_terms(gram, b, c)
            x, lower = solve(gram + each(self.ridge, gram) * within, _columns(between), _columns(held))
            return x.reshape(len(x), b, c, -1).transpose(2, 3), lower, dot(x, within @ x)
        x, lower = solve_by_steps(self._normal_map(), between, held)
        return x, lower, dot(x, self._terms(x))

    def _within_terms(self, gram: Tensor, b: int, c: int) -> Tensor:
        """Return the Gram matrix without what is between different values of the closing bond."""
        if self.closing == "a":
            left, right = self._overlaps()
            return torch.einsum("zabe,zacf->zbcef", left, right).reshape(gram.shape)
        size, shape = (b, (-1, 1, 1, 1)) if self.closing == "b" else (c, (1, -1, 1, 1))
        rows = torch.arange(size, device=gram.device).reshape(shape)
        columns = rows.permute(2, 3, 0, 1)
        return (gram.reshape(-1, b, c, b, c) * (rows == columns)).reshape(gram.shape)

    def _overlaps(self) -> tuple[Tensor, Tensor]:
        """Return the inner products (batch, a, b, b) and (batch, a, c, c) for each value of bond a."""
        right = self.right.permute(0, 3, 2, 1)
        return self.left.mT @ self.left, right.mT @ right

    def _terms(self, x: Tensor) -> Tensor:
        """Return the Gram matrix within the terms times a core (batch, b, n, c)."""
        left, right = self._overlaps()
        return torch.einsum("zabe,zenf,zacf->zbnc", left, x, right)

    def _normal_map(self) -> Map:
        """Return the Gram matrix, that within the terms added ``ridge`` times, as a map of cores (batch, b, n, c).

        It is a sum over pairs of values of bond a of products from the left and the right; those of equal values are
        within the terms.
        """
        batch, a, _, b = self.left.shape
        c = self.right.shape[1]
        same = torch.eye(a).to(self.left)[:, :, None, None]
        weights = 1 + self.ridge.to(self.left)[:, None, None, None, None] * same  # (batch, a, a', 1, 1)
        by_left = (_overlap(self.left).permute(0, 1, 3, 2, 4) * weights).flatten(1, 2)  # (aa', b, b')
        by_right = _overlap(self.right).permute(0, 2, 4, 3, 1).flatten(1, 2)  # (aa', c', c)

        def normal(x: Tensor) -> Tensor:
            moved = by_left @ x.reshape(batch, 1, b, -1)  # (aa', b, n·c')
            return (moved.reshape(batch, a * a, -1, c) @ by_right).sum(1).reshape(x.shape)

        return normal


def _columns(core: Tensor) -> Tensor:
    """Return a core (batch, b, n, c) as (batch, bc, n)."""
    return core.transpose(2, 3).flatten(1, 2)


def _overlap(core: Tensor) -> Tensor:
    """Return the inner products (batch, r, r', r, r') of the fibers of a core (batch, r, n, r')."""
    flat = core.transpose(1, 2).flatten(2)
    return (flat.mT @ flat).reshape(-1, core.shape[1], core.shape[3], core.shape[1], core.shape[3])


def _contracted(tensor: Tensor, left: Tensor, right: Tensor) -> Tensor:
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
