"""Fusion of two or more inputs by a polynomial whose coefficients are coupled CP decompositions."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import Any, Self

import torch
from torch import Tensor, nn

from tenfold.errors import RankError, WeightError


class PolynomialFusion(nn.Module):
    """All products of up to ``order`` different inputs, weighed: b + Σ W⁽ⁱ⁾zᵢ + Σ W⁽ⁱʲ⁾zᵢzⱼ + ..., of low CP rank.

    Kefalas et al. 2020, arXiv 1912.05833. Every W⁽ⁱʲ⁾ = ⟦C, Aᵢ, Aⱼ⟧, and with ``shared`` factors (coupled, as in the
    source) C and all Aᵢ are the same in all orders, so that the sum is C·eₚ(A₁ᵀz₁, ..., A_nᵀz_n) with the elementary
    symmetric polynomials of up to order p. Use it where an answer depends on how inputs go together, such as of two
    views or two senses: concatenation and a linear layer only add what each says by itself.

    Products grow with their order: pass inputs of about unit size, behind a norm or a tanh. Shared factors have
    R·(Σdᵢ + out) + out parameters and multiply-accumulates for a sample, and n·order·R more for the products; separate
    ones ``order`` times as many factors.

    Args:
        in_features: of each input.
        out_features: of the output.
        rank: R, of each term.
        order: the most inputs in a product; all when left out.
        repeats: whether an input may be in a product more than once (squares, cubes).
        shared: whether all orders have the same factors.
        bias: whether there is one.
        place: ``device`` and ``dtype`` as in torch.

    Raises:
        WeightError: fewer than two inputs, or an order that they cannot have.
        RankError: a rank below 1.

    Example:
        >>> fusion = PolynomialFusion((32, 16), 10, rank=8)
        >>> fusion(torch.randn(4, 32), torch.randn(4, 16)).shape, sum(p.numel() for p in fusion.parameters())
        (torch.Size([4, 10]), 474)
    """

    def __init__(
        self,
        in_features: Sequence[int],
        out_features: int,
        rank: int,
        *,
        order: int | None = None,
        repeats: bool = False,
        shared: bool = True,
        bias: bool = True,
        **place: Any,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = tuple(in_features), out_features, rank
        self.order = len(self.in_features) if order is None else order
        self.repeats, self.shared = repeats, shared
        if len(self.in_features) < 2 or min(self.in_features) < 1 or out_features < 1:
            msg = (
                f"in_features={self.in_features}, out_features={out_features}: two inputs or more, of 1 number or more"
            )
            raise WeightError(msg)
        most = len(self.in_features)
        if self.order < 1 or (self.order > most and not repeats):
            msg = f"order={order}: products of {most} different inputs have order 1 to {most}; repeats=True allows more"
            raise WeightError(msg)
        if rank < 1:
            msg = f"rank={rank} of a polynomial is at least 1"
            raise RankError(msg)
        sets = 1 if shared else self.order
        self.inner = nn.ParameterList(torch.empty(sets, rank, d, **place) for d in self.in_features)
        self.outer = nn.Parameter(torch.empty(sets, out_features, rank, **place))
        self.bias = nn.Parameter(torch.empty(out_features, **place)) if bias else None
        self.reset_parameters()

    @property
    def terms(self) -> tuple[int, ...]:
        """How many products there are of each order, from 1."""
        n = len(self.in_features)
        return tuple(comb(n + k - 1, k) if self.repeats else comb(n, k) for k in range(1, self.order + 1))

    def reset_parameters(self) -> None:
        """Draw normal factors at which inputs of variance 1 make outputs of variance ⅓, as torch's linear layers do."""
        for factor in self.inner:
            nn.init.normal_(factor, std=factor.shape[-1] ** -0.5)
        nn.init.normal_(self.outer, std=(3 * self.rank * sum(self.terms)) ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @classmethod
    def from_linear(cls, dense: nn.Linear, in_features: Sequence[int], rank: int, **options: Any) -> Self:
        """Return the layer that computes what a trained one does on concatenated inputs; products begin with 0.

        Exact where ``rank`` is that of its weight, else nearest. Factors are separate: ``options`` are ``order`` and
        ``repeats``.

        Raises:
            WeightError: inputs that do not add up to those of the trained layer.
        """
        if sum(in_features) != dense.in_features:
            msg = f"in_features={tuple(in_features)} are to add up to {dense.in_features}, those of the trained layer"
            raise WeightError(msg)
        like: dict[str, Any] = {
            "device": dense.weight.device,
            "dtype": dense.weight.dtype,
            "bias": dense.bias is not None,
        }
        made = cls(in_features, dense.out_features, rank, shared=False, **like, **options)
        u, s, vh = torch.linalg.svd(dense.weight.detach(), full_matrices=False)
        own = min(rank, len(s))
        with torch.no_grad():
            made.outer.zero_()
            made.outer[0, :, :own] = u[:, :own] * s[:own].sqrt()
            for factor, part in zip(made.inner, vh.split(list(in_features), 1), strict=True):
                factor[0, :own] = s[:own, None].sqrt() * part[:own]
            if made.bias is not None:
                made.bias.copy_(dense.bias)
        return made.train(dense.training)

    def weight(self, *inputs: int) -> Tensor:
        """Return the coefficients (out, d_i, d_j, ...) of the product of the inputs i, j, ..., multiplied out."""
        own = 0 if self.shared else len(inputs) - 1
        found = self.outer[own]
        for k in inputs:
            found = found[..., None, :] * self.inner[k][own].mT  # (out, ..., d, rank)
        return found.sum(-1)

    def macs(self) -> int:
        """Return the multiply-accumulates for one sample."""
        sets = 1 if self.shared else self.order
        products = len(self.in_features) * (self.order if self.shared else self.order * (self.order + 1) // 2)
        return self.rank * (sets * (sum(self.in_features) + self.out_features) + products)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the outputs (..., out_features) of one tensor (..., d) for each input."""
        if tuple(x.shape[-1] for x in inputs) != self.in_features:
            msg = f"inputs of the shapes {[tuple(x.shape) for x in inputs]}: last axes {self.in_features} are asked for"
            raise WeightError(msg)
        out = inputs[0].new_zeros(()) if self.bias is None else self.bias
        for own in range(1 if self.shared else self.order):
            seen = [x @ factor[own].mT for x, factor in zip(inputs, self.inner, strict=True)]
            orders = self._orders(seen, self.order if self.shared else own + 1)
            total = sum(orders[1:], orders[0]) if self.shared else orders[-1]
            out = out + total @ self.outer[own].mT
        return out

    def _orders(self, seen: list[Tensor], order: int) -> list[Tensor]:
        """Return the sums of all products of 1, ..., ``order`` of the tensors, input by input."""
        sums: list[Tensor | None] = [None] * order
        for one in seen:
            for k in range(order) if self.repeats else reversed(range(order)):
                below = None if k == 0 else sums[k - 1]
                term = one if k == 0 else None if below is None else below * one
                if term is not None:
                    held = sums[k]
                    sums[k] = term if held is None else held + term
        return [s for s in sums if s is not None]

    def extra_repr(self) -> str:
        """Return sizes, rank, order and kind."""
        kind = f"repeats={self.repeats}, shared={self.shared}, bias={self.bias is not None}"
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, order={self.order}, {kind}"
