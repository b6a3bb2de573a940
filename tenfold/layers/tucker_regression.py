"""Tensor regression in the Tucker format: a contraction of the map, a small linear layer, and one to the outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.decompositions import Moments, decompose
from tenfold.errors import WeightError
from tenfold.layers.tensor_contraction import TensorContraction
from tenfold.layers.tensor_regression import TensorRegression, check_map, options_of, pooled_pair
from tenfold.records import LayerSpec
from tenfold.tensors import mode_product


class TuckerRegression(TensorRegression):
    """W = G ×_C U_C ×₀ U₀ ... ×_N U_N: the map contracted along its modes, the core, and the outputs.

    Parameters ∏ Rₖ · R_C + Σ Dₖ·Rₖ + C·R_C; a mode without a factor counts with its size. The core begins normal and
    the factors orthonormal, so that the entries of the weight have the variance 1/(3·∏ Dₖ) of torch's linear layers.

    Args:
        in_modes: (D₀, ..., D_N) of a map, the channels first.
        out_features: C.
        ranks: (R₀, ..., R_N, R_C); None for a mode that has no factor.
        options: ``bias``, ``device`` and ``dtype`` as of ``TensorRegression``.

    Raises:
        WeightError: not one rank for each mode and one for the outputs.
        RankError: a rank below 1.

    Example:
        >>> layer = TuckerRegression((64, 8, 8), 10, (16, 3, 3, None))
        >>> layer(torch.zeros(5, 64, 8, 8)).shape, sum(p.numel() for p in layer.parameters())
        (torch.Size([5, 10]), 2522)
    """

    def __init__(self, in_modes: Sequence[int], out_features: int, ranks: Sequence[int | None], **options: Any) -> None:
        super().__init__(in_modes, out_features, **options)
        if len(ranks) != len(self.in_modes) + 1:
            msg = f"ranks={tuple(ranks)} need one for each mode of {self.in_modes}, and one for the outputs"
            raise WeightError(msg)
        place = {name: value for name, value in options.items() if name != "bias"}
        *inner, outer = ranks
        self.contraction = TensorContraction(self.in_modes, inner, **place)
        self.core = nn.Parameter(torch.empty(outer or out_features, prod(self.contraction.out_modes), **place))
        self.outer = None if outer is None else nn.Parameter(torch.empty(out_features, outer, **place))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw orthonormal factors and a normal core whose norm is that of a weight with the entries wanted."""
        for factor in self.contraction.factors.values():
            nn.init.orthogonal_(factor)
        if self.outer is not None:
            nn.init.orthogonal_(self.outer)
        nn.init.normal_(self.core, std=self.std * (self.in_features * self.out_features / self.core.numel()) ** 0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def regress(self, x: Tensor) -> Tensor:
        """Return ⟨X, W⟩ (batch, C) of maps (batch, D₀, ..., D_N)."""
        seen = F.linear(self.contraction(x).flatten(1), self.core)
        return seen if self.outer is None else F.linear(seen, self.outer)

    @property
    def weight(self) -> Tensor:
        """The weight (C, D₀·...·D_N)."""
        found = self.core if self.outer is None else self.outer @ self.core
        tensor: Tensor = found.unflatten(1, self.contraction.out_modes)
        for at, factor in self.contraction.factors.items():
            tensor = mode_product(tensor, factor.mT, int(at) + 1)
        return tensor.flatten(1)

    def macs(self, rows: int) -> int:
        """Return the multiply-accumulates for so many maps."""
        last = 0 if self.outer is None else self.outer.numel()
        return self.contraction.macs(rows) + rows * (self.core.numel() + last)

    @classmethod
    def from_linear(
        cls, dense: nn.Linear, in_modes: Sequence[int], ranks: Mapping[str, int], moments: Moments | None = None
    ) -> Self:
        """Return the layer that is nearest to a trained one behind a flattened map; at full ranks it is that.

        Args:
            dense: the trained layer.
            in_modes: (channels, height, width), or (channels, length), of the map that is flattened.
            ranks: of the format ``tensor_regression``: ``out``, ``in``, ``height``, ``width``; full where left out.
            moments: of the flattened map, as ``calibrate`` finds them; without these the weight alone decides.

        Raises:
            WeightError: a map of another size, or with more than two spatial axes.
            RankError: ranks outside of what the weight allows.

        Example:
            >>> dense = nn.Linear(8 * 3 * 3, 5)
            >>> x = torch.randn(2, 8, 3, 3)
            >>> layer = TuckerRegression.from_linear(dense, (8, 3, 3), {})
            >>> torch.allclose(layer(x), dense(x.flatten(1)), atol=1e-5)
            True
        """
        modes = check_map(dense, in_modes)
        if not 2 <= len(modes) <= 3:
            msg = f"the map {modes} has {len(modes) - 1} spatial axes; one or two can be fitted: (channels, *size)"
            raise WeightError(msg)
        sizes = (*modes, 1)[:3]
        spec = LayerSpec(kind="linear", in_channels=dense.in_features, out_channels=dense.out_features, in_modes=sizes)
        fit = decompose(dense.weight.detach(), "tensor_regression", dict(ranks), spec=spec, moments=moments)
        found = {name: tensor[0] for name, tensor in fit.value.tensors().items()}  # without the axis of groups
        factors = [found.get(f"{name}_factor") for name in ("in", "height", "width")[: len(modes)]]
        outer = found.get("out_factor")
        sides = [None if factor is None else factor.shape[-1] for factor in (*factors, outer)]
        made = cls(modes, dense.out_features, sides, **options_of(dense))
        with torch.no_grad():
            made.core.copy_(found["core"].flatten(1))
            for at, factor in enumerate(factors):
                if factor is not None:
                    made.contraction.factors[str(at)].copy_(factor.mT)
            if made.outer is not None and outer is not None:
                made.outer.copy_(outer)
        return made.like_(dense)

    @classmethod
    def from_pooled(cls, dense: nn.Linear, size: Sequence[int], rank: int | None = None) -> Self:
        """Return the layer that takes a map (channels, *size) and does what a global average pooling and a head do.

        Exactly, with constant spatial factors of rank one, which training may change; with ``rank`` the head is
        truncated besides.

        Example:
            >>> dense, x = nn.Linear(8, 5), torch.randn(2, 8, 4, 6)
            >>> layer = TuckerRegression.from_pooled(dense, (4, 6))
            >>> torch.allclose(layer(x), dense(x.mean((2, 3))), atol=1e-6)
            True
        """
        channels = None if rank is None else min(rank, *dense.weight.shape)
        made = cls(
            (dense.in_features, *size), dense.out_features, (channels, *[1] * len(size), channels), **options_of(dense)
        )
        left, right = pooled_pair(dense, rank)
        with torch.no_grad():
            for at, n in enumerate(size, 1):
                made.contraction.factors[str(at)].fill_(1 / n)
            if made.outer is None:
                made.core.copy_(dense.weight)
            else:
                made.core.copy_(torch.eye(left.shape[1]))
                made.outer.copy_(left)
                made.contraction.factors["0"].copy_(right)
        return made.like_(dense)
