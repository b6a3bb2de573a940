"""Kernels of many convolutions as one tensor train: outputs, layers, taps and inputs in a row."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.networks.kernel_bank import KernelBank, Ranks
from tenfold.records import Shape
from tenfold.tensors.trains import tt_svd


class TrainBank(KernelBank):
    """W = U[out] · A[layer] · B[tap] · Vᵀ[in]: a train over the modes outputs, layers, taps, inputs.

    Core_l = A[l] B of rank ``layers`` between the layers and the taps, with A (r_out, L, r), B (r, *kernel, r_in). So
    all layers share the filters in B, and each mixes them in its own way. Parameters out·r_out + r_out·L·r + r·K·r_in +
    in·r_in; the rank ``layers`` reaches min(L·r_out, K·r_in). The arguments are those of ``KernelBank``.

    Example:
        >>> bank = TrainBank(5, 64, 64, (3, 3), {"layers": 48, "out": 32, "in": 32})
        >>> sum(p.numel() for p in bank.parameters())
        25600
    """

    def __init__(self, *shape: Any, **options: Any) -> None:
        super().__init__(*shape, **options)
        layers, out, inner, *kernel = self.full_shape
        bond, outer, into = (self.ranks[name] for name in self.rank_names)
        self.mixes = nn.Parameter(torch.empty(outer, layers, bond, **self._place))
        self.taps = nn.Parameter(torch.empty(bond, into, *kernel, **self._place))
        self.out_factor = nn.Parameter(torch.empty(out, outer, **self._place)) if outer < out else None
        self.in_factor = nn.Parameter(torch.empty(inner, into, **self._place)) if into < inner else None
        self.reset_parameters()

    @classmethod
    def max_ranks(cls, shape: Shape, ranks: Ranks) -> dict[str, int]:
        """Return the channels, and the smaller side of the cores as a matrix."""
        layers, out, inner, *kernel = shape
        sides = layers * ranks.get("out", out), prod(kernel) * ranks.get("in", inner)
        return {"layers": min(sides), "out": out, "in": inner}

    @classmethod
    def count(cls, shape: Shape, ranks: Ranks) -> int:
        """Return the number of parameters at these ranks."""
        layers, out, inner, *kernel = shape
        bond, outer, into = (ranks[name] for name in cls.rank_names)
        factors = (out * outer if outer < out else 0) + (inner * into if into < inner else 0)
        return bond * (outer * layers + prod(kernel) * into) + factors

    @property
    def outer(self) -> Tensor | None:
        """The factor of the outputs."""
        return self.out_factor

    @property
    def inner(self) -> Tensor | None:
        """The factor of the inputs."""
        return self.in_factor

    @property
    def mixing(self) -> int:
        """Multiply-accumulates that mix one core."""
        return self.ranks["out"] * self.taps.numel()

    def core(self, index: int) -> Tensor:
        """Return the core of one of the kernels."""
        core: Tensor = (self.mixes[:, index] @ self.taps.flatten(1)).unflatten(1, self.taps.shape[1:])
        return core

    def cores(self) -> Tensor:
        """Return the cores of all kernels."""
        return torch.einsum("alr,r...->la...", self.mixes, self.taps)

    @torch.no_grad()
    def fill_(self, weights: Tensor) -> None:
        """Take the TT-SVD of weights (L, out, in, *kernel), the factors of the inputs orthonormal."""
        bond, outer, into = (self.ranks[name] for name in self.rank_names)
        kernel = weights.shape[3:]
        tensor = weights.flatten(3).permute(1, 0, 3, 2)  # (out, L, K, in)
        first, mixes, taps, last = tt_svd(tensor, (outer, bond, into))
        if self.out_factor is None:
            mixes = torch.einsum("or,rlb->olb", first[0], mixes)
        else:
            self.out_factor.copy_(first[0])
        taps = taps.movedim(2, 1)  # (bond, r_in, K)
        if self.in_factor is None:
            taps = torch.einsum("brk,ri->bik", taps, last[..., 0])
        else:
            self.in_factor.copy_(last[..., 0].mT)
        self.mixes.copy_(mixes)
        self.taps.copy_(taps.unflatten(2, kernel))

    @torch.no_grad()
    def transform_(self, outputs: Tensor, inputs: Tensor) -> None:
        """Multiply outputs and inputs of all kernels with matrices."""
        if self.out_factor is None:
            self.mixes.copy_(torch.einsum("or,rlb->olb", outputs, self.mixes))
        else:
            self.out_factor.copy_(outputs @ self.out_factor)
        if self.in_factor is None:
            self.taps.copy_(torch.einsum("ir,br...->bi...", inputs, self.taps))
        else:
            self.in_factor.copy_(inputs @ self.in_factor)
