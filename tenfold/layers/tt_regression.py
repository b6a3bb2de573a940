"""Tensor regression in the tensor-train format: the map meets one core for each of its modes, in turn."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.decompositions import Moments
from tenfold.decompositions.roots import Whitening
from tenfold.layers.tensor_regression import TensorRegression, check_map, options_of, pooled_pair
from tenfold.layers.tt_modes import each_rank
from tenfold.tensors.trains import tt_balance, tt_core_std, tt_norm, tt_svd, tt_to_dense


class TTRegression(TensorRegression):
    """W = G₀[i₀] G₁[i₁] ... G_N[i_N] G_C[c]: a train of cores (r, Dₖ, r') over the modes of the map, and the outputs.

    Parameters Σ r·Dₖ·r' + r·C. The cores begin normal, scaled so that the entries of the weight have the variance
    1/(3·∏ Dₖ) of torch's linear layers.

    Args:
        in_modes: (D₀, ..., D_N) of a map, the channels first.
        out_features: C.
        ranks: one for every bond, or one for each of the N + 1.
        options: ``bias``, ``device`` and ``dtype`` as of ``TensorRegression``.

    Raises:
        RankError: not one positive rank for each bond.

    Example:
        >>> layer = TTRegression((64, 8, 8), 10, (16, 8, 8))
        >>> layer(torch.zeros(5, 64, 8, 8)).shape, sum(p.numel() for p in layer.parameters())
        (torch.Size([5, 10]), 2650)
    """

    def __init__(self, in_modes: Sequence[int], out_features: int, ranks: int | Sequence[int], **options: Any) -> None:
        super().__init__(in_modes, out_features, **options)
        place: Any = {name: value for name, value in options.items() if name != "bias"}
        self.ranks = each_rank(ranks, len(self.in_modes) + 1)
        sides = (1, *self.ranks, 1)
        sizes = (*self.in_modes, out_features)
        self.cores = nn.ParameterList(torch.empty(sides[k], n, sides[k + 1], **place) for k, n in enumerate(sizes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw normal cores, scaled so that the entries of the weight have exactly the spread wanted."""
        with torch.no_grad():
            for core in self.cores:
                nn.init.normal_(core, std=tt_core_std(self.std, self.ranks))
            seen = float(tt_norm(tuple(core.double() for core in self.cores)))
            share = (self.std * (self.in_features * self.out_features) ** 0.5 / seen) ** (1 / len(self.cores))
            for core in self.cores:
                core.mul_(share)
            if self.bias is not None:
                nn.init.zeros_(self.bias)

    def regress(self, x: Tensor) -> Tensor:
        """Return ⟨X, W⟩ (batch, C) of maps (batch, D₀, ..., D_N)."""
        *inner, last = self.cores
        seen = x.unsqueeze(1)  # (batch, r, Dₖ, ..., D_N)
        for core in inner:
            folded = seen.flatten(1, 2)
            end = folded.dim() - 1
            seen = F.linear(folded.movedim(1, end), core.flatten(0, 1).mT).movedim(end, 1)
        return F.linear(seen, last[:, :, 0].mT)

    @property
    def weight(self) -> Tensor:
        """The weight (C, D₀·...·D_N)."""
        return tt_to_dense(tuple(self.cores)).movedim(-1, 0).flatten(1)

    def macs(self, rows: int) -> int:
        """Return the multiply-accumulates for so many maps."""
        *inner, last = self.cores
        total: int = last.numel()
        for at, core in enumerate(inner):
            total += core.numel() * prod(self.in_modes[at + 1 :])
        return rows * total

    @classmethod
    def from_linear(
        cls, dense: nn.Linear, in_modes: Sequence[int], ranks: int | Sequence[int], moments: Moments | None = None
    ) -> Self:
        """Return the layer with the TT-SVD of a trained one behind a flattened map; at full ranks it is that.

        Args:
            dense: the trained layer.
            in_modes: (channels, *size) of the map that is flattened.
            ranks: one for every bond, or one for each; larger ones than needed are met with zeros.
            moments: of the flattened map, as ``calibrate`` finds them: then each mode is whitened by the covariance
                that it has on its own before, which brings the outputs nearer, not the weight.

        Raises:
            WeightError: a map of another size.
            RankError: not one positive rank for each bond.

        Example:
            >>> dense, x = nn.Linear(8 * 3 * 3, 5), torch.randn(2, 8, 3, 3)
            >>> layer = TTRegression.from_linear(dense, (8, 3, 3), 99)
            >>> torch.allclose(layer(x), dense(x.flatten(1)), atol=1e-5)
            True
        """
        modes = check_map(dense, in_modes)
        weight = dense.weight.detach().double()[None]
        whitening = None if moments is None else Whitening.of(_scaled(moments), modes)
        white = weight if whitening is None else whitening.whiten(weight)
        found = tt_svd(white[0].unflatten(1, modes).movedim(0, -1), each_rank(ranks, len(modes) + 1))
        cores = list(found)
        for at in range(len(modes) if whitening is not None else 0):
            assert whitening is not None  # noqa: S101 - as the range says
            cores[at] = torch.einsum("anb,mn->amb", cores[at], whitening.inverses[at][0])
        made = cls(modes, dense.out_features, [core.shape[-1] for core in cores[:-1]], **options_of(dense))
        with torch.no_grad():
            for own, core in zip(made.cores, tt_balance(tuple(cores)), strict=True):
                own.copy_(core)
        return made.like_(dense)

    @classmethod
    def from_pooled(cls, dense: nn.Linear, size: Sequence[int], rank: int | None = None) -> Self:
        """Return the layer that takes a map (channels, *size) and does what a global average pooling and a head do.

        Exactly, with all bonds min(channels, C) and cores that average; a smaller ``rank`` truncates the head.

        Example:
            >>> dense, x = nn.Linear(8, 5), torch.randn(2, 8, 4, 6)
            >>> torch.allclose(TTRegression.from_pooled(dense, (4, 6))(x), dense(x.mean((2, 3))), atol=1e-6)
            True
        """
        left, right = pooled_pair(dense, rank)
        bond = left.shape[1]
        made = cls((dense.in_features, *size), dense.out_features, bond, **options_of(dense))
        with torch.no_grad():
            made.cores[0].copy_(right.mT[None])
            made.cores[-1].copy_(left.mT[:, :, None])
            for at, n in enumerate(size, 1):
                made.cores[at].copy_((torch.eye(bond) / n)[:, None].expand(-1, n, -1))
        return made.like_(dense)


def _scaled(moments: Moments) -> Any:
    """Return the covariance of the inputs with a mean variance of 1."""
    covariance: Any = moments.covariance()
    level = covariance.diagonal() if not isinstance(covariance, Tensor) else covariance.diagonal(dim1=-2, dim2=-1)
    scale = level.mean(-1).clamp_min(torch.finfo(torch.float64).tiny)
    return covariance / scale[:, None, None] if isinstance(covariance, Tensor) else covariance.scaled(1 / scale)
