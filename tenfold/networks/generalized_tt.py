"""Tensor-train networks as recurrent networks, with the choice of the operation that multiplies features and states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.errors import UnknownNameError, WeightError
from tenfold.registry import did_you_mean

Operation = Callable[[Tensor, Tensor], Tensor]


def rectifier(x: Tensor, y: Tensor) -> Tensor:
    """Return max(x, y, 0) of all entries."""
    return torch.maximum(x, y).relu()


def log_sum_exp(x: Tensor, y: Tensor) -> Tensor:
    """Return log(eˣ + eʸ) of all entries."""
    return torch.logaddexp(x, y)


OPERATIONS: dict[str, Operation] = {
    "log_sum_exp": log_sum_exp,
    "product": torch.mul,
    "rectifier": rectifier,
    "sum": torch.add,
}


class GeneralizedTTNetwork(nn.Module):
    """A tensor train over the features of all steps, read as a recurrent network: h'ₖ = Σᵢⱼ Gᵢⱼₖ ξ(fᵢ(x), hⱼ).

    With ξ the product it is a train of shared cores, and scores are linear in the product of all features (Khrulkov et
    al. 2018, arXiv 1711.00811); with another associative and commutative ξ, such as max(x, y, 0), it is the
    generalized tensor network of Khrulkov et al. 2019 (arXiv 1901.10801). Use it to study what a non-linearity adds;
    ``TTLSTM`` is the practical network for sequences. The product of all features, of dᵀ numbers for T steps, is never
    formed; for the product neither is that of one step's features and states: its cores meet the features first where
    that is cheaper.

    The first feature is 1, and its part of the core begins as the identity, so that states last over many steps; they
    are normalised after each. A step has d·R² parameters for R states and d features, and as many multiply-accumulates.

    Args:
        input_size: numbers in a step.
        outputs: of the network, such as classes.
        rank: R.
        features: d, the constant included.
        operation: ξ, by name (``OPERATIONS``) or as a function of two tensors that broadcast.
        place: ``device`` and ``dtype`` as in torch.

    Raises:
        UnknownNameError: an unknown operation.
        WeightError: a size below 1.

    Example:
        >>> GeneralizedTTNetwork(14, 10, rank=16, features=24, operation="rectifier")(torch.rand(5, 14, 14)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        input_size: int,
        outputs: int,
        *,
        rank: int,
        features: int,
        operation: str | Operation = "rectifier",
        **place: Any,
    ) -> None:
        super().__init__()
        if min(input_size, outputs, rank, features - 1) < 1:
            msg = f"input_size={input_size}, outputs={outputs}, rank={rank} are at least 1, features={features} 2"
            raise WeightError(msg)
        if isinstance(operation, str) and operation not in OPERATIONS:
            msg = f"unknown operation {operation!r}. {did_you_mean(operation, OPERATIONS)} Or pass a function."
            raise UnknownNameError(msg)
        self.operation = operation if isinstance(operation, str) else getattr(operation, "__name__", "a function")
        self._operation = OPERATIONS[operation] if isinstance(operation, str) else operation
        self.rank, self.local = rank, features
        self.inner = nn.Linear(input_size, features - 1, **place)
        self.core = nn.Parameter(torch.empty(rank, features, rank, **place))
        self.first = nn.Parameter(torch.empty(rank, **place))
        self.norm = nn.LayerNorm(rank, **place)
        self.head = nn.Linear(rank, outputs, **place)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a core of small entries around the identity for the constant feature, and a first state of ones."""
        nn.init.normal_(self.core, std=0.5 * (self.rank * self.local) ** -0.5)
        with torch.no_grad():
            self.core[:, 0] += torch.eye(self.rank).to(self.core)
        nn.init.ones_(self.first)

    def features_of(self, x: Tensor) -> Tensor:
        """Return the features (..., d) of steps (..., input_size): 1, and rectified linear ones."""
        found = self.inner(x).relu()
        return torch.cat([torch.ones_like(found[..., :1]), found], -1)

    def step(self, features: Tensor, state: Tensor) -> Tensor:
        """Return the state (batch, R) after features (batch, d)."""
        if self._operation is torch.mul and self.rank > 1:
            met = (features @ self.core.transpose(0, 1).flatten(1)).unflatten(1, (self.rank, self.rank))
            after: Tensor = (state[:, None] @ met)[:, 0]
            return after
        pairs = self._operation(features[:, None, :], state[:, :, None])
        return pairs.flatten(1) @ self.core.flatten(0, 1)

    def states(self, x: Tensor) -> Tensor:
        """Return the last state (batch, R) of sequences (batch, steps, input_size), each normalised on the way."""
        state = self.first.expand(x.shape[0], -1)
        for features in self.features_of(x).unbind(1):
            state = self.norm(self.step(features, state))
        return state

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (batch, outputs) of sequences (batch, steps, input_size)."""
        if x.dim() != 3 or x.shape[-1] != self.inner.in_features:
            wanted = self.inner.in_features
            msg = f"the input has the shape {tuple(x.shape)}; (batch, steps, {wanted}) is asked for"
            raise WeightError(msg)
        scores: Tensor = self.head(self.states(x))
        return scores

    def extra_repr(self) -> str:
        """Return rank, features and operation."""
        return f"rank={self.rank}, features={self.local}, operation={self.operation}"
