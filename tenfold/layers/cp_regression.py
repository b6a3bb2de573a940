"""Tensor regression in the CP format: a sum of rank-one weights, one vector for each mode of the map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.decompositions import Moments, decompose
from tenfold.errors import RankError
from tenfold.formats import Kruskal
from tenfold.layers.tensor_regression import TensorRegression, check_map, options_of, pooled_pair
from tenfold.records import LayerSpec
from tenfold.tensors import kruskal


class CPRegression(TensorRegression):
    """W = Σ_r u_r^C ∘ u_r⁰ ∘ ... ∘ u_r^N: R scores, each the map seen through one vector for each mode.

    Parameters R·(C + Σ Dₖ). The factors begin normal, scaled so that the entries of the weight have the variance
    1/(3·∏ Dₖ) of torch's linear layers.

    Args:
        in_modes: (D₀, ..., D_N) of a map, the channels first.
        out_features: C.
        rank: R.
        options: ``bias``, ``device`` and ``dtype`` as of ``TensorRegression``.

    Raises:
        RankError: a rank below 1.

    Example:
        >>> layer = CPRegression((64, 8, 8), 10, 20)
        >>> layer(torch.zeros(5, 64, 8, 8)).shape, sum(p.numel() for p in layer.parameters())
        (torch.Size([5, 10]), 1810)
    """

    def __init__(self, in_modes: Sequence[int], out_features: int, rank: int, **options: Any) -> None:
        super().__init__(in_modes, out_features, **options)
        if rank < 1:
            msg = f"rank={rank} of a sum of rank-one weights has to be at least 1"
            raise RankError(msg)
        place: Any = {name: value for name, value in options.items() if name != "bias"}
        self.factors = nn.ParameterList(torch.empty(n, rank, **place) for n in self.in_modes)
        self.outer = nn.Parameter(torch.empty(out_features, rank, **place))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw normal factors, scaled so that the entries of the weight have exactly the spread wanted."""
        with torch.no_grad():
            own = [self.outer, *self.factors]
            for factor in own:
                nn.init.normal_(factor)
            seen = float(kruskal.norm([factor.double()[None] for factor in own]))
            share = (self.std * (self.in_features * self.out_features) ** 0.5 / seen) ** (1 / len(own))
            for factor in own:
                factor.mul_(share)
            if self.bias is not None:
                nn.init.zeros_(self.bias)

    def regress(self, x: Tensor) -> Tensor:
        """Return ⟨X, W⟩ (batch, C) of maps (batch, D₀, ..., D_N)."""
        first, *sides = self.factors
        last = x.dim() - 1
        seen = F.linear(x.movedim(1, last), first.mT).movedim(last, 1)  # (batch, R, D₁, ..., D_N)
        for factor in reversed(sides):
            seen = torch.einsum("br...n,nr->br...", seen, factor)
        return F.linear(seen, self.outer)

    @property
    def weight(self) -> Tensor:
        """The weight (C, D₀·...·D_N)."""
        return kruskal.to_tensor([factor[None] for factor in (self.outer, *self.factors)])[0].flatten(1)

    def macs(self, rows: int) -> int:
        """Return the multiply-accumulates for so many maps."""
        channels, *sides = self.in_modes
        rank, left = self.outer.shape[1], self.in_features // channels
        total = channels * rank * left
        for n in reversed(sides):
            total += rank * left
            left //= n
        return rows * (total + self.outer.numel())

    @classmethod
    def from_linear(cls, dense: nn.Linear, in_modes: Sequence[int], rank: int, moments: Moments | None = None) -> Self:
        """Return the layer of some rank that is near to a trained one behind a flattened map.

        It is fitted as a convolution whose kernel covers the map, by the algorithms of ``cp3`` and ``cp4``.

        Args:
            dense: the trained layer.
            in_modes: (channels, *size) of the map that is flattened, with one to three spatial axes.
            rank: R.
            moments: of the flattened map, as ``calibrate`` finds them; without these the weight alone decides.

        Raises:
            WeightError: a map of another size.
            RankError: a rank outside of what the weight allows.
        """
        modes = check_map(dense, in_modes)
        spec = LayerSpec(kind="conv", in_channels=modes[0], out_channels=dense.out_features, kernel=modes[1:])
        format = "cp4" if sum(n > 1 for n in modes[1:]) > 1 else "cp3"
        kernel = dense.weight.detach().unflatten(1, modes)
        found = decompose(kernel, format, {"rank": rank}, spec=spec, moments=moments).value
        assert isinstance(found, Kruskal)  # noqa: S101 - the format that was asked for
        outer, first, *along = (factor[0] for factor in found.factors())
        made = cls(modes, dense.out_features, outer.shape[1], **options_of(dense))
        rest = iter(along)
        with torch.no_grad():
            made.outer.copy_(outer)
            made.factors[0].copy_(first)
            for at, n in enumerate(modes[1:], 1):
                made.factors[at].copy_(next(rest) if n > 1 else torch.ones(1, outer.shape[1]))
        return made.like_(dense)

    @classmethod
    def from_pooled(cls, dense: nn.Linear, size: Sequence[int], rank: int | None = None) -> Self:
        """Return the layer that takes a map (channels, *size) and does what a global average pooling and a head do.

        Exactly, with rank min(channels, C) and constant spatial vectors; a smaller ``rank`` truncates the head.

        Example:
            >>> dense, x = nn.Linear(8, 5), torch.randn(2, 8, 4, 6)
            >>> torch.allclose(CPRegression.from_pooled(dense, (4, 6))(x), dense(x.mean((2, 3))), atol=1e-6)
            True
        """
        left, right = pooled_pair(dense, rank)
        made = cls((dense.in_features, *size), dense.out_features, left.shape[1], **options_of(dense))
        with torch.no_grad():
            made.outer.copy_(left)
            made.factors[0].copy_(right.mT)
            for at, n in enumerate(size, 1):
                made.factors[at].fill_(1 / n)
        return made.like_(dense)
