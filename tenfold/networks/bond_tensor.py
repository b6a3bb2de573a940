"""The best tensor on two neighbouring sites of a matrix product state, all others held: conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

CostName = Literal["cross_entropy", "squared"]

CHUNK = 2000  # samples at a time: what a processor's cache holds
DAMPING = 1e-3  # of the second moments of states, as a share of their mean eigenvalue
_NEWTON = 4  # steps of the line search, each elementwise in the scores


@dataclass(frozen=True, eq=False)
class Cost:
    """A convex cost of scores (classes, samples) under labels, in the mean over the samples.

    Classes come first: reductions over a handful of them are fast only so.

    Attributes:
        name: ``cross_entropy``, or ``squared``, half the squared distance to one-hot labels (Stoudenmire & Schwab).
        labels: (samples,), int64.
    """

    name: CostName
    labels: Tensor

    def value(self, scores: Tensor) -> float:
        """Return the cost."""
        if self.name == "cross_entropy":
            most = scores.amax(0)
            total = (scores - most).exp().sum(0).log() + most
            return float((total - scores.gather(0, self.labels[None])[0]).mean())
        return float((scores - self._wanted(scores)).square().sum(0).mean() / 2)

    def slope(self, scores: Tensor) -> Tensor:
        """Return the derivative by the scores of every sample, not yet divided by their number."""
        return self._softmax(scores) - self._wanted(scores)

    def along(self, scores: Tensor, change: Tensor) -> tuple[float, float]:
        """Return the first and the second derivative along ``change`` of the scores."""
        p = self._softmax(scores)
        first = float(((p * change).sum(0) - change.gather(0, self.labels[None])[0]).mean())
        if self.name == "squared":
            return first, float(change.square().sum(0).mean())
        return first, float(((p * change.square()).sum(0) - (p * change).sum(0).square()).mean())

    def _softmax(self, scores: Tensor) -> Tensor:
        """Return what the cost compares with one-hot labels: probabilities, or the scores themselves."""
        if self.name == "squared":
            return scores
        found = (scores - scores.amax(0)).exp()
        return found / found.sum(0)

    def _wanted(self, scores: Tensor) -> Tensor:
        return torch.zeros_like(scores).scatter_(0, self.labels[None], 1.0)


@dataclass(frozen=True, eq=False)
class BondProblem:
    """All that the rest of the network says of two sites: f(x) = left · B · right for every sample.

    Attributes:
        left: (samples, p), the states before the two sites times the features of the first.
        right: (samples, q), the features of the second times the states behind it.
        cost: of the scores.
        ridge: weight of half the squared norm of B.
    """

    left: Tensor
    right: Tensor
    cost: Cost
    ridge: float = 0.0

    def scores(self, tensor: Tensor) -> Tensor:
        """Return the scores (classes, samples) of B (p, classes, q)."""
        parts = zip(self.left.split(CHUNK), self.right.split(CHUNK), strict=True)
        return torch.cat([self._scores(tensor, one, other) for one, other in parts]).mT.contiguous()

    def gradient(self, slope: Tensor, tensor: Tensor) -> Tensor:
        """Return the gradient by B (p, classes, q), from the slopes (classes, samples) of the cost."""
        found = torch.zeros_like(tensor).flatten(1)
        parts = zip(self.left.split(CHUNK), self.right.split(CHUNK), slope.mT.split(CHUNK), strict=True)
        for one, other, by_score in parts:
            found.addmm_(one.mT, (by_score[:, :, None] * other[:, None, :]).flatten(1))
        return (found / slope.shape[1]).view_as(tensor) + self.ridge * tensor

    def solve(self, tensor: Tensor, steps: int) -> tuple[Tensor, float]:
        """Return a better B after at most so many conjugate gradients (Polak-Ribière), and its cost without ridge.

        Directions are preconditioned by the second moments of the states on both sides, whose product is the Hessian
        up to the weights of the samples. Scores are linear in B, so that a line search needs no pass over the network:
        each step costs one product with B and one gradient. The cost with its ridge never rises.
        """
        scores = self.scores(tensor)
        gradient = direction = torch.zeros_like(tensor)
        size = 0.0  # of the gradient in the preconditioner's norm
        for _ in range(steps):
            before, gradient = gradient, self.gradient(self.cost.slope(scores), tensor)
            steep = self._preconditioned(gradient)
            mixed = max(float(((gradient - before) * steep).sum()) / size, 0.0) if size > 0 else 0.0
            size = float((gradient * steep).sum())
            direction = mixed * direction - steep
            if float((direction * gradient).sum()) >= 0:
                direction = -steep
            change = self.scores(direction)
            length = self._line_search(scores, change, tensor, direction)
            if length == 0:
                break
            tensor, scores = tensor + length * direction, scores + length * change
        return tensor, self.cost.value(scores)

    @cached_property
    def roots(self) -> tuple[Tensor, Tensor]:
        """Lower triangular roots L of the second moments LLᵀ of the states on both sides, damped."""
        found = []
        for states in (self.left, self.right):
            moment = states.mT @ states / len(states)
            moment.diagonal().add_(DAMPING * moment.diagonal().mean() + torch.finfo(moment.dtype).tiny)
            found.append(torch.linalg.cholesky(moment))
        return found[0], found[1]

    @cached_property
    def _inverses(self) -> tuple[Tensor, Tensor]:
        return torch.cholesky_inverse(self.roots[0]), torch.cholesky_inverse(self.roots[1])

    def _preconditioned(self, gradient: Tensor) -> Tensor:
        before, behind = self._inverses
        return (before @ gradient.flatten(1)).view_as(gradient) @ behind

    def _scores(self, tensor: Tensor, left: Tensor, right: Tensor) -> Tensor:
        partly = (left @ tensor.flatten(1)).unflatten(1, tensor.shape[1:])
        scores: Tensor = (partly @ right[..., None]).squeeze(-1)
        return scores

    def _line_search(self, scores: Tensor, change: Tensor, tensor: Tensor, direction: Tensor) -> float:
        """Return how far to go: Newton's method on the convex cost along the line, never uphill; 0 for not at all."""
        inner, square = self.ridge * float((tensor * direction).sum()), self.ridge * float(direction.square().sum())

        def cost(t: float) -> float:
            return self.cost.value(scores + t * change) + t * inner + t * t * square / 2

        t, start = 0.0, cost(0.0)
        for _ in range(_NEWTON):
            slope, bend = self.cost.along(scores + t * change, change)
            if not bend + square > 0:
                break
            move = (slope + inner + t * square) / (bend + square)
            t -= move
            if abs(move) < 1e-2 * abs(t):
                break
        while t != 0 and not cost(t) <= start:  # Newton went too far where the curvature is small
            t = t / 2 if abs(t) > 1e-12 else 0.0
        return t
