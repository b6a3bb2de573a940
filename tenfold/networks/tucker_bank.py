"""Kernels of many convolutions in the Tucker format: few cores, and each layer a mix of them."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.networks.kernel_bank import KernelBank, Ranks
from tenfold.records import Shape
from tenfold.tensors import gram, leading_eigenvectors, mode_product


class TuckerBank(KernelBank):
    """W = G ×_layers M ×_out U ×_in V: core_l = Σ_a M[l, a] G_a, with few cores G_a (r_out, r_in, *kernel).

    Parameters r_layers·r_out·r_in·K + L·r_layers + out·r_out + in·r_in. With all layers kept each has a core of its
    own, between shared factors. The arguments are those of ``KernelBank``.

    Example:
        >>> bank = TuckerBank(5, 64, 64, (3, 3), {"layers": 3, "out": 32, "in": 32})
        >>> sum(p.numel() for p in bank.parameters()), 5 * 64 * 64 * 9
        (31759, 184320)
    """

    def __init__(self, *shape: Any, **options: Any) -> None:
        super().__init__(*shape, **options)
        layers, out, inner, *kernel = self.full_shape
        most, outer, into = (self.ranks[name] for name in self.rank_names)
        self.shared = nn.Parameter(torch.empty(most, outer, into, *kernel, **self._place))
        self.mixes = nn.Parameter(torch.empty(layers, most, **self._place)) if most < layers else None
        self.out_factor = nn.Parameter(torch.empty(out, outer, **self._place)) if outer < out else None
        self.in_factor = nn.Parameter(torch.empty(inner, into, **self._place)) if into < inner else None
        self.reset_parameters()

    @classmethod
    def max_ranks(cls, shape: Shape, ranks: Ranks) -> dict[str, int]:
        """Return the sizes of the modes."""
        del ranks
        return dict(zip(cls.rank_names, shape, strict=False))

    @classmethod
    def count(cls, shape: Shape, ranks: Ranks) -> int:
        """Return the number of parameters at these ranks."""
        full = cls.max_ranks(shape, ranks)
        factors = sum(full[name] * rank for name, rank in ranks.items() if rank < full[name])
        return prod(ranks.values()) * prod(shape[3:]) + factors

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
        return 0 if self.mixes is None else self.shared.numel()

    def core(self, index: int) -> Tensor:
        """Return the core of one of the kernels."""
        return self.shared[index] if self.mixes is None else torch.einsum("a,a...->...", self.mixes[index], self.shared)

    def cores(self) -> Tensor:
        """Return the cores of all kernels."""
        return self.shared if self.mixes is None else torch.einsum("la,a...->l...", self.mixes, self.shared)

    @torch.no_grad()
    def fill_(self, weights: Tensor) -> None:
        """Take the HOSVD of weights (L, out, in, *kernel)."""
        core = weights
        for mode, factor in enumerate((self.mixes, self.out_factor, self.in_factor)):
            if factor is not None:
                found = leading_eigenvectors(gram(weights.movedim(mode, 0).flatten(1)), factor.shape[1])
                factor.copy_(found)
                core = mode_product(core, found.mT, mode)
        self.shared.copy_(core)

    @torch.no_grad()
    def transform_(self, outputs: Tensor, inputs: Tensor) -> None:
        """Multiply outputs and inputs of all kernels with matrices."""
        for mode, matrix, factor in ((1, outputs, self.out_factor), (2, inputs, self.in_factor)):
            if factor is None:
                self.shared.copy_(mode_product(self.shared, matrix, mode))
            else:
                factor.copy_(matrix @ factor)
