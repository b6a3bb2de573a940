"""Linear layers whose weight is a tensor train from the start, contracted core by core in the cheapest order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import combinations, pairwise
from math import prod
from typing import Any, Self, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.errors import WeightError
from tenfold.layers.tt_modes import CoreOptions, each_rank
from tenfold.tensors.modes import mode_factors
from tenfold.tensors.trains import Cores, merge_modes, tt_balance, tt_core_std, tt_norm, ttm_svd, ttm_to_dense

Modes = tuple[int, ...]
# Runs of cores, merged into one each, and whether the last of them meets the input first.
Order = tuple[tuple[tuple[int, int], ...], bool]

# Compiled and exported programs take any number of rows, in the order that is best for this many.
COMPILED_ROWS = 256


class TTLinear(nn.Module):
    """A linear layer whose weight (out, in) is a train of cores (r, out mode, in mode, r'), never multiplied out.

    Novikov et al. 2015, arXiv 1509.06569. The first mode of rows and columns is the slowest. How the input meets the
    cores is decided by the number of rows of the input: from the left or from the right, and which neighbouring cores
    are multiplied first because that is cheaper (``order``). Each step is one batched product of
    large matrices, on views.

    Args:
        in_features: number of inputs.
        out_features: number of outputs.
        ranks: one for every bond or one for each, taken as they are.
        in_modes: their product ``in_features``; balanced when left out.
        out_modes: their product ``out_features``, as many as there are ``in_modes``; balanced when left out.
        cores: how many cores, where no modes are given.
        bias: whether there is one.
        options: ``std``, the standard deviation of the entries of the weight to begin with, (3·in)^-½ when left out,
            as torch has it; ``device`` and ``dtype`` as in torch.

    Raises:
        WeightError: modes that do not make the weight.

    Example:
        >>> layer = TTLinear(57_600, 256, 4, in_modes=(8, 20, 20, 18), out_modes=(4, 4, 4, 4), bias=False)
        >>> sum(p.numel() for p in layer.parameters())
        2976
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ranks: int | Sequence[int] = 8,
        *,
        in_modes: Sequence[int] | None = None,
        out_modes: Sequence[int] | None = None,
        cores: int = 3,
        bias: bool = True,
        **options: Unpack[CoreOptions],
    ) -> None:
        super().__init__()
        count = len(in_modes or out_modes or range(cores))
        self.in_modes: Modes = tuple(in_modes) if in_modes else mode_factors(in_features, count, pad=False).modes
        self.out_modes: Modes = tuple(out_modes) if out_modes else mode_factors(out_features, count, pad=False).modes
        sides = (prod(self.in_modes), prod(self.out_modes))
        if sides != (in_features, out_features) or len(self.in_modes) != len(self.out_modes):
            msg = (
                f"in_modes={self.in_modes} must multiply to {in_features}, out_modes={self.out_modes} to "
                f"{out_features}, and both must be as many; leave them out to have them chosen"
            )
            raise WeightError(msg)
        self.in_features, self.out_features = in_features, out_features
        self.ranks = each_rank(ranks, count)
        std = options.get("std")
        place: Any = {name: value for name, value in options.items() if name != "std"}
        self.std = (3 * in_features) ** -0.5 if std is None else std
        self._compiled = self.order(COMPILED_ROWS)
        r = (1, *self.ranks, 1)
        shapes = [(r[k], m, n, r[k + 1]) for k, (m, n) in enumerate(zip(self.out_modes, self.in_modes, strict=True))]
        self.cores = nn.ParameterList(torch.empty(s, **place) for s in shapes)
        self.bias = nn.Parameter(torch.empty(out_features, **place)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw normal cores, scaled so that the entries of the weight have exactly the standard deviation ``std``."""
        with torch.no_grad():
            for core in self.cores:
                nn.init.normal_(core, std=tt_core_std(self.std, self.ranks))
            seen = float(tt_norm(tuple(c.double() for c in merge_modes(self.train_cores()))))
            factor = self.std * (self.in_features * self.out_features) ** 0.5 / seen if seen > 0 else 1.0
            for core in self.cores:
                core.mul_(factor ** (1 / len(self.cores)))
            if self.bias is not None:
                nn.init.uniform_(self.bias, -(self.in_features**-0.5), self.in_features**-0.5)

    @classmethod
    def from_linear(cls, dense: nn.Linear, ranks: int | Sequence[int] = 8, **options: Any) -> Self:
        """Return the layer with the TT-SVD of a trained weight; ``options`` are modes and the number of cores.

        Example:
            >>> dense = nn.Linear(12, 8)
            >>> layer = TTLinear.from_linear(dense, 99, cores=2)
            >>> x = torch.randn(3, 12)
            >>> torch.allclose(layer(x), dense(x), atol=1e-5)
            True
        """
        made = cls(
            dense.in_features,
            dense.out_features,
            ranks,
            bias=dense.bias is not None,
            device=dense.weight.device,
            dtype=dense.weight.dtype,
            **options,
        )
        made.fill_(dense.weight)
        if made.bias is not None:
            with torch.no_grad():
                made.bias.copy_(dense.bias)
        return made.train(dense.training)

    @torch.no_grad()
    def fill_(self, weight: Tensor) -> None:
        """Put the TT-SVD of a dense weight (out, in) into the cores, their norms balanced."""
        wide = weight.detach().to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
        found = ttm_svd(wide, self.out_modes, self.in_modes, self.ranks)
        for core, new in zip(self.cores, tt_balance(merge_modes(found)), strict=True):
            core.copy_(new.view_as(core))

    def train_cores(self) -> Cores:
        """Return the cores (r, out mode, in mode, r'); gradients flow through them."""
        return tuple(self.cores)

    @property
    def weight(self) -> Tensor:
        """The weight (out, in), multiplied out on every access: what the layer exists to avoid."""
        return ttm_to_dense(self.train_cores())

    def order(self, rows: int) -> Order:
        """Return in which order an input of so many rows meets the cores."""
        return _cheapest(self.out_modes, self.in_modes, self.ranks, rows)

    def macs(self, rows: int) -> int:
        """Return the multiply-accumulates for an input of so many rows."""
        return _macs(_Shape(self.out_modes, self.in_modes, self.ranks), self.order(rows), rows)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        """Return input @ weightᵀ + bias, for input (..., in_features)."""
        compiling = torch.compiler.is_compiling()  # there the number of rows may have to stay open
        runs, backwards = self._compiled if compiling else self.order(prod(input.shape[:-1]))
        own = self.train_cores()
        cores = [_merged(own[start:stop]) for start, stop in runs]
        if len(cores) == 1:
            return F.linear(input, cores[0][0, :, :, 0], self.bias)
        sweep = _from_right if backwards else _from_left
        out = sweep(cores, input.reshape(-1, self.in_features).t()).t().reshape(*input.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        """Return sizes, modes and ranks."""
        modes = f"in_modes={self.in_modes}, out_modes={self.out_modes}, ranks={self.ranks}"
        return f"{self.in_features}, {self.out_features}, {modes}, bias={self.bias is not None}"


def _merged(cores: Sequence[Tensor]) -> Tensor:
    """Return the one core (r, ∏ out modes, ∏ in modes, r') that a run of cores makes."""
    found = cores[0]
    for core in cores[1:]:
        left, m, n, _ = found.shape
        _, more_m, more_n, right = core.shape
        product = (found.flatten(0, 2) @ core.flatten(1)).view(left, m, n, more_m, more_n, right)
        found = product.transpose(2, 3).reshape(left, m * more_m, n * more_n, right)
    return found


def _from_left(cores: Sequence[Tensor], x: Tensor) -> Tensor:
    """Return the product (out, rows) with an input (in, rows), the first core first.

    Before a core the axes are (outs so far), (r · its in mode), (ins to come · rows): every step is a view, and a
    product of large matrices, because the rows of the input are the last axis.
    """
    rows, met = x.shape[-1], 1
    for core in cores:
        left, m, n, right = core.shape
        weight = core.permute(1, 3, 0, 2).reshape(m * right, left * n)
        x = torch.bmm(weight.expand(met, -1, -1), x.reshape(met, left * n, -1))
        met *= m
    return x.reshape(met, rows)


def _from_right(cores: Sequence[Tensor], x: Tensor) -> Tensor:
    """Return the product (out, rows) with an input (in, rows), the last core first.

    Before a core the axes are (ins to come), (its in mode · r), (outs so far · rows).
    """
    rows, to_come = x.shape[-1], x.shape[0]
    for core in reversed(cores):
        left, m, n, right = core.shape
        to_come //= n
        weight = core.reshape(left * m, n * right)
        x = torch.bmm(weight.expand(to_come, -1, -1), x.reshape(to_come, n * right, -1))
    return x.reshape(-1, rows)


class _Shape(tuple[Modes, Modes, Modes]):
    """Out modes, in modes and ranks, hashable."""

    __slots__ = ()

    def __new__(cls, out_modes: Modes, in_modes: Modes, ranks: Modes) -> Self:
        return super().__new__(cls, (out_modes, in_modes, ranks))


@lru_cache(maxsize=4096)
def _cheapest(out_modes: Modes, in_modes: Modes, ranks: Modes, rows: int) -> Order:
    shape = _Shape(out_modes, in_modes, ranks)
    return min(_orders(len(out_modes)), key=lambda order: (_macs(shape, order, rows), len(order[0])))


def _orders(count: int) -> Iterator[Order]:
    for size in range(count):
        for cuts in combinations(range(1, count), size):
            runs = tuple(pairwise((0, *cuts, count)))
            yield runs, False
            yield runs, True


def _macs(shape: _Shape, order: Order, rows: int) -> int:
    out_modes, in_modes, ranks = shape
    runs, backwards = order
    r = (1, *ranks, 1)
    total = 0
    for start, stop in runs:  # merging
        for k in range(start + 1, stop):
            sides = prod(out_modes[start : k + 1]) * prod(in_modes[start : k + 1])
            total += r[start] * sides * r[k] * r[k + 1]
    met, to_come = 1, prod(in_modes)
    for start, stop in reversed(runs) if backwards else runs:
        m, n = prod(out_modes[start:stop]), prod(in_modes[start:stop])
        to_come //= n
        total += rows * met * to_come * m * n * r[start] * r[stop]
        met *= m
    return total
