"""What enters a linear layer in the dense model: its outputs there follow, however many they are."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from tenfold.decompositions.covariance import centred_square


@dataclass(frozen=True, eq=False)
class DenseInputs:
    """Moments of the inputs x' of a layer in the dense model, where it puts out W x', without its bias.

    E[y xᵀ] of the outputs is W E[x' xᵀ]: n² numbers stand for out·n, and no output is ever computed.

    Attributes:
        second_moment: E[x' x'ᵀ] (groups, n, n), not centred.
        mean: E[x'] (groups, n).
        cross: E[x' xᵀ] (groups, n, n), with the inputs x that enter the layer now.

    Example:
        >>> x = torch.randn(1, 50, 4, dtype=torch.float64)
        >>> known = DenseInputs(x.mT @ x / 50, x.mean(1), 2 * x.mT @ x / 50)  # of 2 x, that is
        >>> torch.allclose(known.centred_cross(2 * x.mean(1)), 2 * known.covariance())
        True
    """

    second_moment: Tensor
    mean: Tensor
    cross: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Return what is stored, by name."""
        return dict(vars(self))

    def to(self, device: torch.device | str) -> Self:
        """Return it on another device."""
        return dataclasses.replace(self, **{k: v.to(device) for k, v in self.tensors().items()})

    def uncentered(self) -> Self:
        """Return it about zero instead of the mean."""
        return dataclasses.replace(self, mean=torch.zeros_like(self.mean))

    def covariance(self) -> Tensor:
        """Return E[(x'−x̄')(x'−x̄')ᵀ] (groups, n, n)."""
        return centred_square(self.second_moment, self.mean)

    def centred_cross(self, mean: Tensor) -> Tensor:
        """Return E[(x'−x̄')(x−x̄)ᵀ] (groups, n, n) for the mean (groups, n) of x."""
        return self.cross - self.mean.unsqueeze(-1) * mean.unsqueeze(-2)
