"""Tensor contraction: every mode of a feature map but the batch is multiplied with a small factor."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.errors import RankError
from tenfold.records import Shape


class TensorContraction(nn.Module):
    """A map (batch, D₀, ..., D_N) made smaller along its modes to (batch, R₀, ..., R_N): X ×₀ V₀ ×₁ V₁ ... ×_N V_N.

    Kossaifi et al. 2017, *Tensor contraction layers for parsimonious deep nets* (CVPR workshops). Each factor (Rₖ, Dₖ)
    begins as torch's linear layers do. The modes are contracted in an order that makes the map small soon; a mode whose
    size is None in ``ranks`` has no factor and passes. Parameters Σ Rₖ·Dₖ, where a linear layer of the flattened map
    has ∏ Dₖ · ∏ Rₖ. Use it before a head, or between layers of a network that is trained from scratch; a head behind a
    flattened map that is trained already becomes a ``TuckerRegression``, which begins with a contraction.

    Args:
        in_modes: (D₀, ..., D_N), the channels first.
        ranks: (R₀, ..., R_N), each an int or None.
        bias: whether a bias of the shape of the output is added.
        device: as in torch.
        dtype: as in torch.

    Raises:
        RankError: not one rank for each mode, or one below 1.

    Example:
        >>> layer = TensorContraction((64, 8, 8), (16, 3, 3))
        >>> layer(torch.zeros(5, 64, 8, 8)).shape, sum(p.numel() for p in layer.parameters())
        (torch.Size([5, 16, 3, 3]), 1072)
    """

    def __init__(
        self,
        in_modes: Sequence[int],
        ranks: Sequence[int | None],
        *,
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.in_modes: Shape = tuple(in_modes)
        if len(self.in_modes) != len(ranks) or any(rank is not None and rank < 1 for rank in ranks):
            msg = f"ranks={tuple(ranks)} need a number ≥ 1, or None, for each of the modes {self.in_modes}"
            raise RankError(msg)
        self.out_modes: Shape = tuple(n if r is None else r for n, r in zip(self.in_modes, ranks, strict=True))
        place: Any = {"device": device, "dtype": dtype}
        pairs = zip(self.in_modes, ranks, strict=True)
        self.factors = nn.ParameterDict(
            {str(at): nn.Parameter(torch.empty(r, n, **place)) for at, (n, r) in enumerate(pairs) if r is not None}
        )
        self.bias = nn.Parameter(torch.empty(self.out_modes, **place)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the factors uniformly within ±Dₖ^-½, as torch draws linear layers; the bias is 0."""
        for factor in self.factors.values():
            nn.init.uniform_(factor, -(factor.shape[1] ** -0.5), factor.shape[1] ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def order(self) -> tuple[int, ...]:
        """The modes that have a factor, in the order in which they are contracted: the strongest reductions first."""
        sizes = zip(self.in_modes, self.out_modes, strict=True)
        shares = [out / size for size, out in sizes]
        return tuple(sorted((int(at) for at in self.factors), key=lambda at: (shares[at], -at)))

    def macs(self, rows: int) -> int:
        """Return the multiply-accumulates for so many maps."""
        total, sizes = 0, list(self.in_modes)
        for at in self.order:
            total += prod(sizes) * self.out_modes[at]
            sizes[at] = self.out_modes[at]
        return rows * total

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        """Return the contraction (batch, R₀, ..., R_N) of maps (batch, D₀, ..., D_N)."""
        x, last = input, len(self.in_modes)
        for at in self.order:
            x = F.linear(x.movedim(at + 1, last), self.factors[str(at)]).movedim(last, at + 1)
        return x if self.bias is None else x + self.bias

    def extra_repr(self) -> str:
        """Return both shapes."""
        return f"{self.in_modes} → {self.out_modes}, bias={self.bias is not None}"
