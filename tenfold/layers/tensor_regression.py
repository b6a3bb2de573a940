"""Tensor regression: a linear layer of a feature map whose weight is a small tensor network, never multiplied out."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from math import prod
from typing import Any, Self

import torch
from torch import Tensor, nn

from tenfold.errors import WeightError
from tenfold.layers.map_linear import MapLinear
from tenfold.records import Shape


class TensorRegression(nn.Module, abc.ABC):
    """Outputs y = ⟨X, W⟩ + b of maps X (batch, *in_modes), or of their flattened form, with a factorized weight W.

    Kossaifi et al. 2020, *Tensor regression networks* (arXiv 1707.08308). It stands in place of the flattening, or the
    pooling, and the linear layer at the end of a network: ``TuckerRegression``, ``CPRegression`` and ``TTRegression``
    say how W (C, D₀, ..., D_N) is written. ``from_linear`` starts from a trained head behind a flattened map,
    ``from_pooled``, exactly, from one behind a global average pooling, whose spatial factors are constant. Use it to
    train a head with few parameters that sees where in the map things are; within ``compress`` the format
    ``tensor_regression`` does the Tucker form by itself.

    Args:
        in_modes: (D₀, ..., D_N) of a map, the channels first.
        out_features: C.
        bias: whether there is one.
        device: as in torch.
        dtype: as in torch.

    Raises:
        WeightError: no modes, or one below 1.
    """

    def __init__(
        self, in_modes: Sequence[int], out_features: int, *, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.in_modes: Shape = tuple(in_modes)
        self.out_features = out_features
        if not self.in_modes or min(*self.in_modes, out_features) < 1:
            msg = f"in_modes={self.in_modes} and out_features={out_features} have to be sizes ≥ 1: (channels, *size)"
            raise WeightError(msg)
        self.in_features = prod(self.in_modes)
        # As torch draws the weight of a linear layer with so many inputs.
        self.std = (3 * self.in_features) ** -0.5
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @abc.abstractmethod
    def regress(self, x: Tensor) -> Tensor:
        """Return ⟨X, W⟩ (batch, C) of maps (batch, D₀, ..., D_N)."""

    @property
    @abc.abstractmethod
    def weight(self) -> Tensor:
        """The weight (C, D₀·...·D_N), multiplied out on every access: what the layer exists to avoid."""

    @abc.abstractmethod
    def macs(self, rows: int) -> int:
        """Return the multiply-accumulates for so many maps."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        """Return the outputs (batch, C) of maps (batch, D₀, ..., D_N), or flattened (batch, D₀·...·D_N).

        Raises:
            WeightError: maps of another shape.
        """
        if tuple(input.shape[1:]) not in (self.in_modes, (self.in_features,)):
            msg = (
                f"a tensor regression of maps {self.in_modes} takes (batch, {', '.join(map(str, self.in_modes))}) or "
                f"(batch, {self.in_features}), not {tuple(input.shape)}: make the layer for the map that it is to take"
            )
            raise WeightError(msg)
        found = self.regress(input.reshape(-1, *self.in_modes))
        return found if self.bias is None else found + self.bias

    @torch.no_grad()
    def to_linear(self) -> MapLinear:
        """Return the linear layer of the flattened map with this weight, which knows the map."""
        dense = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        dense.weight = nn.Parameter(self.weight.clone())
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.clone())
        return MapLinear.of(dense, self.in_modes).train(self.training)

    @torch.no_grad()
    def like_(self, dense: nn.Linear) -> Self:
        """Take over bias and mode of a trained layer; return itself."""
        if self.bias is not None and dense.bias is not None:
            self.bias.copy_(dense.bias)
        return self.train(dense.training)

    def extra_repr(self) -> str:
        """Return the sizes."""
        return f"{self.in_modes} → {self.out_features}, bias={self.bias is not None}"


def check_map(dense: nn.Linear, in_modes: Sequence[int]) -> Shape:
    """Return the modes of a map that a linear layer takes flat.

    Raises:
        WeightError: the map has another number of entries than the layer has inputs.
    """
    if prod(in_modes) != dense.in_features:
        msg = (
            f"a map of shape {tuple(in_modes)} has {prod(in_modes)} entries, the layer takes {dense.in_features}: "
            "pass (channels, *size) of the map that is flattened"
        )
        raise WeightError(msg)
    return tuple(in_modes)


def pooled_pair(dense: nn.Linear, rank: int | None) -> tuple[Tensor, Tensor]:
    """Return matrices (C, r) and (r, channels) whose product is the weight of a head behind a global pooling.

    Of full rank, exactly; of a smaller one the nearest, by SVD.
    """
    u, s, v = torch.linalg.svd(dense.weight.detach().double(), full_matrices=False)
    kept = len(s) if rank is None else min(rank, len(s))
    root = s[:kept].sqrt()
    return u[:, :kept] * root, root[:, None] * v[:kept]


def options_of(dense: nn.Linear) -> dict[str, Any]:
    """Return bias, device and dtype of a layer, as constructors take them."""
    return {"bias": dense.bias is not None, "device": dense.weight.device, "dtype": dense.weight.dtype}
