"""Alternating least squares for sums of rank-one tensors: many tensors and many starts at once, any order.

A sweep reads the tensor twice, whatever its order. With the two longest modes a and b and the rest k (for a
convolution: outputs, inputs and taps), the tensor times the factor of b, T[k, a, r] = Σ_b X[k, a, b]·B[b, r], serves
the update of a and then, summed with the new A, those of all the rest (a dimension tree; Phan, Tichavský & Cichocki
2013, IEEE TSP 61(19)); the tensor times the new A serves that of b. Both are plain matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod

import torch
from torch import Tensor

from tenfold.tensors import khatri_rao, kruskal

# Below so many entries one vectorised product is faster than a loop over slices that stay in the cache.
_VECTORISED = 1 << 18

_GROW, _SHRINK, _FIRST = 1.2, 0.5, 0.5

# The error must fall by less than the tolerance on average over so many sweeps: with momentum it falls unevenly.
_WINDOW = 8

# Holds a factor where the others do not determine it, as a share of the diagonal of their Gram matrix.
_HOLD = {torch.float64: 1e-13, torch.float32: 1e-9}

# From this ridge on, as a share of the diagonal, normal equations of float32 tensors are solved in float32: rounding is
# some 1e-5 of the diagonal at a few hundred terms, and what it leaves is next to nothing beside the errors.
_SINGLE = 2e-5

# Below its rounding a hold does nothing.
_EPSILON = {torch.float64: 1e-16, torch.float32: 1e-8}

# Squared errors below this share of the squared norm are rounding.
_FLOOR = {torch.float64: 1e-15, torch.float32: 1e-13}


@dataclass(frozen=True, eq=False)
class Swept:
    """What alternating least squares came to.

    Attributes:
        factors: for each mode (batch, starts, n, R).
        squares: squared errors ‖X − X̂‖² (batch, starts), float64.
        history: relative errors ‖X − X̂‖/‖X‖ after each sweep (sweeps, batch, starts).
        converged: whether the errors of all tensors and starts had stopped falling.
    """

    factors: list[Tensor]
    squares: Tensor
    history: Tensor
    converged: bool

    def best(self) -> list[Tensor]:
        """Return for each mode the factor (batch, n, R) of the start with the least error."""
        rows = torch.arange(len(self.squares), device=self.squares.device)
        return [f[rows, self.squares.argmin(1)] for f in self.factors]


@dataclass(frozen=True, eq=False)
class Arranged:
    """Tensors laid out such that both long contractions are matrix products without a copy."""

    entries: Tensor  # (batch, prod(rest), a, b)
    a: int
    b: int
    rest: tuple[int, ...]
    sizes: tuple[int, ...]
    total: Tensor  # ‖X‖² (batch, 1), float64

    @classmethod
    def of(cls, tensor: Tensor) -> Arranged:
        """Return the layout of tensors (batch, n_1, …, n_N), N ≥ 2."""
        sizes = tuple(tensor.shape[1:])
        a, b = sorted(sorted(range(len(sizes)), key=lambda m: -sizes[m])[:2])
        rest = tuple(m for m in range(len(sizes)) if m not in (a, b))
        turned = tensor.permute(0, *(m + 1 for m in rest), a + 1, b + 1)
        entries = turned.reshape(len(tensor), prod(sizes[m] for m in rest), sizes[a], sizes[b]).contiguous()
        total = torch.linalg.vector_norm(entries.flatten(1), dim=1, dtype=torch.float64).square()
        return cls(entries, a, b, rest, sizes, total[:, None])

    def along(self, factor: Tensor, mode: int) -> Tensor:
        """Return the tensor times the factor (batch, n, S, R) of a long mode: (batch, rest, other, S·R)."""
        columns = factor.flatten(2)
        if mode == self.b:
            product: Tensor = self.entries.flatten(1, 2) @ columns
            return product.view(len(columns), *self.entries.shape[1:3], -1)
        return torch.matmul(self.entries.mT, columns[:, None])

    def shares(self, factors: Sequence[Tensor]) -> Tensor:
        """Return the Khatri-Rao product (batch, prod(rest), S·R) of the factors of the rest."""
        if len(self.rest) == 1:
            return factors[self.rest[0]].flatten(2)
        first = self.entries.new_ones(len(self.entries), 1, factors[0][0, 0].numel())
        return reduce(khatri_rao, (factors[m].flatten(2) for m in self.rest), first)


def alternate(
    tensor: Tensor, starts: Sequence[Tensor], *, n_iter: int, tol: float, momentum: bool = True, ridge: float = 0.0
) -> Swept:
    """Return the factors after sweeps of alternating least squares, the objective of which never rises.

    With ``momentum`` each sweep starts ahead of where the last one ended, along the way it went: Nesterov's
    extrapolation with an adaptive length and a restart when the objective would rise (Ang, Cohen, Gillis & Hien 2019;
    Mitchell, Ye & De Sterck 2020), here nearly free, because T is linear in the factor of b.

    Args:
        tensor: (batch, n_1, …, n_N), float32 or float64; Gram matrices are float64 but where the ridge is large enough
            for float32, and errors are summed in float64 in any case.
        starts: for each mode the factors (batch, starts, n, R); that of the longest mode is not used.
        n_iter: sweeps at most.
        tol: stop when the roots of all objectives fall by less than this share of themselves in a sweep.
        momentum: whether to extrapolate.
        ridge: the objective is ‖X − X̂‖² + ρ·Σ λ_r², λ the norms of the terms and ρ this times the least ‖X − X̂‖²/‖X‖²
            so far. It keeps terms from growing without bound while they cancel, and vanishes for an exact fit.

    Example:
        >>> x = torch.einsum("ir,jr,kr->ijk", torch.eye(3), torch.eye(3), torch.ones(2, 3))[None]
        >>> generator = torch.Generator().manual_seed(0)
        >>> start = [torch.randn(1, 1, n, 3, generator=generator) for n in (3, 3, 2)]
        >>> alternate(x, start, n_iter=50, tol=1e-9).squares.sqrt().item() < 1e-2
        True
    """
    arranged = Arranged.of(tensor)
    state = _State(arranged, [f.movedim(1, 2).to(tensor) for f in starts], ridge)
    history: list[Tensor] = []
    objectives: list[Tensor] = []  # the errors alone may rise a little while terms shrink
    converged = False
    while not converged and len(history) < n_iter:
        state.sweep(momentum=momentum)
        history.append((state.squares / state.total).sqrt())
        objectives.append((state.objective / state.total).sqrt())
        converged = _calm(objectives, tol) or bool((history[-1].square() <= _FLOOR[tensor.dtype]).all())
    return Swept([f.movedim(2, 1) for f in state.factors], state.squares, torch.stack(history), converged)


def _calm(history: list[Tensor], tol: float) -> bool:
    return len(history) > _WINDOW and bool((history[-1 - _WINDOW] - history[-1] <= _WINDOW * tol * history[-1]).all())


class _State:
    """The factors (batch, n, S, R) of all starts on their way, and what the last sweep leaves for the next one."""

    def __init__(self, arranged: Arranged, factors: list[Tensor], ridge: float) -> None:
        self.arranged = arranged
        self.factors = factors
        batch, _, starts, _ = factors[0].shape
        self.total = torch.where(arranged.total > 0, arranged.total, 1.0)
        self.squares = arranged.total.expand(batch, starts)
        self.objective = torch.full_like(self.squares, torch.inf)
        self._length = torch.full_like(self.squares, _FIRST)
        self._share, self._hold = ridge, _HOLD[arranged.entries.dtype]
        self._ridge = torch.zeros_like(self.squares)
        self._precision = torch.float64
        self._grams = [self._gram(f) for f in factors]
        self._before: tuple[list[Tensor], Tensor] | None = None

    def sweep(self, *, momentum: bool) -> None:
        """Update every factor once."""
        x, ends, grams = self.arranged, list(self.factors), list(self._grams)
        product = x.along(ends[x.b], x.b)
        before, self._before = self._before, (ends, product)
        begun = before is not None
        if momentum and before is not None:
            product = self._ahead(product, before)
        else:
            self._update(x.a, self._through(product))
        self._update_rest(_summed(product, self.factors[x.a].flatten(2)))
        del product, before
        right = _weighted(x.along(self.factors[x.a], x.a), x.shares(self.factors)).unflatten(-1, self._columns)
        squares, powers = self._score(x.b, *self._update(x.b, right))
        worse = squares + self._ridge * powers > self.objective  # by rounding only: the factors stay as they were
        if bool(worse.any()):
            self._choose(~worse, ends, grams, range(len(ends)))
        self.squares = torch.where(worse, self.squares, squares)
        ridge = self._share * self.squares / self.total
        self._ridge = torch.minimum(self._ridge, ridge) if begun else ridge
        self.objective = torch.where(worse, self.objective, squares + self._ridge * powers)
        self._choose_precision()

    def _choose_precision(self) -> None:
        """Go on in float32 while the ridge allows for it: the ridge falls with the error, so this ends once at most."""
        if self.arranged.entries.dtype == torch.float32 and self._share > 0:
            precision = torch.float32 if bool((self._ridge >= _SINGLE).all()) else torch.float64
            if precision != self._precision:
                self._precision = precision
                self._grams = [self._gram(f) for f in self.factors]

    def _gram(self, factor: Tensor) -> Tensor:
        """Return (batch, S, R, R) of a factor (batch, n, S, R)."""
        wide = factor.movedim(2, 1).to(self._precision)
        square: Tensor = wide.mT @ wide
        return square

    @property
    def _columns(self) -> tuple[int, int]:
        _, _, starts, rank = self.factors[0].shape
        return starts, rank

    def _through(self, product: Tensor) -> Tensor:
        """Return the right-hand side (batch, a, S, R) of the longest mode."""
        right: Tensor = _weighted(product, self.arranged.shares(self.factors)).unflatten(-1, self._columns)
        return right

    def _update(self, mode: int, right: Tensor) -> tuple[Tensor, Tensor]:
        """Set the best factor of a mode, all others given; return the right-hand side and the others' Gram matrix."""
        others = reduce(torch.mul, (g for m, g in enumerate(self._grams) if m != mode))
        right, centre = right.to(self._precision), self.factors[mode].to(self._precision)
        factor = solve(others, right, centre, self._ridge, self._hold).to(self.factors[mode].dtype)
        factor = factor.contiguous()  # as the products are, which it is multiplied with
        self.factors[mode], self._grams[mode] = factor, self._gram(factor)
        return right, others

    def _score(self, mode: int, right: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        """Return squared errors and Σ λ_r² (batch, S), by what the update of this mode, the last one, returned."""
        inner = (right * self.factors[mode]).sum((1, 3), dtype=torch.float64)
        products = others * self._grams[mode]
        squares = (self.arranged.total - 2 * inner + products.sum((2, 3), dtype=torch.float64)).clamp_min(0)
        return squares, products.diagonal(dim1=2, dim2=3).sum(-1, dtype=torch.float64)

    def _ahead(self, product: Tensor, before: tuple[list[Tensor], Tensor]) -> Tensor:
        """Step ahead, update the factor of a from there, and return the product that belongs to where we are then."""
        x, ends, grams = self.arranged, list(self.factors), list(self._grams)
        last, old = before
        moving = (x.b, *x.rest)
        further = 1 + self._length.to(product.dtype)
        for mode in moving:
            self.factors[mode] = torch.lerp(last[mode], ends[mode], further[:, None, :, None])
            self._grams[mode] = self._gram(self.factors[mode])
        ahead = old.lerp_(product, self._per_column(further))  # linear, as the product is
        squares, powers = self._score(x.a, *self._update(x.a, self._through(ahead)))
        good = squares + self._ridge * powers <= self.objective
        self._length = torch.where(good, (self._length * _GROW).clamp_max(1.0), self._length * _SHRINK)
        if bool(good.all()):
            return ahead
        self._choose(good, ends, grams, moving)
        ahead = torch.where(self._per_column(good), ahead, product) if bool(good.any()) else product
        self._update(x.a, self._through(ahead))
        return ahead

    def _per_column(self, values: Tensor) -> Tensor:
        return values[..., None].expand(-1, -1, self._columns[1]).reshape(len(values), 1, 1, -1)

    def _choose(self, kept: Tensor, factors: list[Tensor], grams: list[Tensor], modes: Sequence[int]) -> None:
        """Keep the factors of these modes where ``kept`` (batch, S), and take those given elsewhere."""
        for mode in modes:
            self.factors[mode] = torch.where(kept[:, None, :, None], self.factors[mode], factors[mode])
            self._grams[mode] = torch.where(kept[:, :, None, None], self._grams[mode], grams[mode])

    def _update_rest(self, slices: Tensor) -> None:
        """Update the short modes, one after the other, from what is left of the tensor without the long ones."""
        x = self.arranged
        if len(x.rest) == 1:
            self._update(x.rest[0], slices.unflatten(-1, self._columns))
            return
        partial = slices.reshape(len(slices), *(x.sizes[m] for m in x.rest), -1)
        for mode in x.rest:
            flat = [f.flatten(2) for f in self.factors]
            self._update(mode, kruskal.contract_rest(partial, flat, x.rest, mode).unflatten(-1, self._columns))


def solve(gram: Tensor, right: Tensor, centre: Tensor, ridge: Tensor, hold: float) -> Tensor:
    """Return F (batch, n, S, R) with F·(Γ + ridge·diag Γ) = right, near ``centre`` where that determines nothing.

    Γ (batch, S, R, R) gets the ridge (batch, S) and ``hold`` on its diagonal, in shares of it, or as much more of that
    as Cholesky needs, whose error does not depend on the scale of the terms; all in the precision of Γ. The hold is a
    proximal term, which moves no solution, and nothing where it is below the rounding.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(diagonal > 0, diagonal, 1.0)
    held = gram.clone()
    for _ in range(12):
        held.diagonal(dim1=-2, dim2=-1).copy_(torch.addcmul(diagonal, scale, (ridge + hold).to(scale)[..., None]))
        upper, failed = torch.linalg.cholesky_ex(held, upper=True)
        if not bool(failed.any()):
            break
        hold *= 10
    if hold > _EPSILON[gram.dtype]:
        right = torch.addcmul(right, centre, scale.unsqueeze(1), value=hold)
    right = right.movedim(2, 1)
    if right.shape[-2] >= right.shape[-1]:  # for many rows the inverse pays
        solution: Tensor = right @ torch.cholesky_inverse(upper, upper=True)
    elif right.dtype == torch.float32:  # by far the faster of the two on some processors, in this precision
        half = torch.linalg.solve_triangular(upper, right, upper=True, left=False)
        solution = torch.linalg.solve_triangular(upper.mT, half, upper=False, left=False)
    else:
        solution = torch.cholesky_solve(right.mT, upper, upper=True).mT
    return solution.movedim(1, 2)


def _weighted(product: Tensor, shares: Tensor) -> Tensor:
    """Return Σ_k product[:, k]·shares[:, k]: (batch, n, S·R) from (batch, rest, n, S·R) and (batch, rest, S·R)."""
    if product.numel() < _VECTORISED or product.shape[1] > 64:
        return (product * shares.unsqueeze(2)).sum(1)
    total = product[:, 0] * shares[:, :1]
    for k in range(1, product.shape[1]):
        total.addcmul_(product[:, k], shares[:, k : k + 1])
    return total


def _summed(product: Tensor, factor: Tensor) -> Tensor:
    """Return Σ_n product[:, :, n]·factor[:, n]: (batch, rest, S·R) from (batch, rest, n, S·R) and (batch, n, S·R)."""
    if product.numel() < _VECTORISED or product.shape[1] > 64:
        return (product * factor.unsqueeze(1)).sum(2)
    return torch.stack([(product[:, k] * factor).sum(1) for k in range(product.shape[1])], dim=1)
