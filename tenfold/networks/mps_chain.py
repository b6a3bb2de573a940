"""A matrix product state with its site of the classes as the centre: what sweeps move along."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from tenfold.networks.mps_classifier import MPSClassifier, step_left, step_right, times

if TYPE_CHECKING:
    from tenfold.networks.mps_sweeps import SweepConfig


@dataclass(eq=False)
class Chain:
    """Cores that are orthogonal towards the centre, up to a number, and the states of all samples around it.

    Attributes:
        cores: (r, d, r') each, that of the centre (r, d, classes, r').
        features: (samples, d) of each site.
        left: the states before each site, where they are known: up to the centre.
        right: the states behind each site: from the centre on.
    """

    cores: list[Tensor]
    features: list[Tensor]
    left: list[Tensor]
    right: list[Tensor]

    @classmethod
    def of(cls, model: MPSClassifier, inputs: Tensor) -> Self:
        """Return the chain of a model, which computes the same, and the states of the inputs."""
        cores = [core.detach().clone() for core in model.cores]
        features = [f.to(cores[0].dtype) for f in model.features_of(inputs).unbind(1)]
        ones, middle, last = features[0].new_ones(len(inputs), 1), model.label_site, model.sites - 1
        made = cls(cores, features, [ones] * (last + 1), [ones] * (last + 1))
        for k in range(middle):
            a, d, b = cores[k].shape
            frame, carry = torch.linalg.qr(cores[k].reshape(a * d, b))
            made.cores[k] = frame.view(a, d, -1)
            made.cores[k + 1] = torch.tensordot(carry, cores[k + 1], 1)
            made._pass_right(k, k + 1)
        for k in range(last, middle, -1):
            a, d, b = cores[k].shape
            frame, carry = torch.linalg.qr(cores[k].reshape(a, d * b).mT)
            made.cores[k] = frame.mT.reshape(-1, d, b)
            made.cores[k - 1] = torch.tensordot(cores[k - 1], carry.mT, 1)
            made._pass_left(k, k - 1)
        return made

    def around(self, site: int, *, rightwards: bool) -> tuple[Tensor, Tensor]:
        """Return the states (samples, r·d) up to the pair of the centre and its neighbour, and (samples, d·r')."""
        first = site if rightwards else site - 1
        left = times(self.left[first], self.features[first])
        return left, times(self.features[first + 1], self.right[first + 1])

    def pair(self, site: int, *, rightwards: bool) -> Tensor:
        """Return the tensor (r·d, classes, d·r') of the pair."""
        if rightwards:  # (a, s, l, b) and (b, t, c)
            pair: Tensor = torch.tensordot(self.cores[site], self.cores[site + 1], 1)
            return pair.flatten(-2).flatten(0, 1)
        joined: Tensor = torch.tensordot(self.cores[site - 1], self.cores[site], 1)  # (a, s, t, l, c)
        return joined.transpose(2, 3).flatten(-2).flatten(0, 1)

    def split(
        self, site: int, tensor: Tensor, roots: tuple[Tensor, Tensor], config: SweepConfig, *, rightwards: bool
    ) -> float:
        """Split the tensor (r·d, classes, d·r') of the pair and move the centre on; return the share dropped.

        What is dropped is measured in the scores: in the metric of the second moments LLᵀ of the states on both sides,
        whose roots L are given. The states behind the split then have nearly the identity for second moments.
        """
        first = site if rightwards else site - 1
        d = self.features[0].shape[1]
        before, behind = roots
        white = (before.mT @ tensor.flatten(1)).view_as(tensor) @ behind
        whole = tensor.unflatten(0, (-1, d)).unflatten(-1, (d, -1))  # (a, s, l, t, c)
        u, s, vh = torch.linalg.svd(white.flatten(1) if rightwards else white.flatten(0, 1), full_matrices=False)
        rank, dropped = _bond(s, config.bonds, config.cutoff)
        head, tail = u[:, :rank], s[:rank, None] * vh[:rank]
        if not rightwards:
            head, tail = u[:, :rank] * s[:rank], vh[:rank]
        head, tail = (
            head.unflatten(0, (len(before), -1)),
            tail.unflatten(1, (-1, len(behind))),
        )  # (a·s, l, r), (r, l, t·c)
        head = torch.linalg.solve_triangular(before.mT, head.flatten(1), upper=True).view_as(head)
        tail = torch.linalg.solve_triangular(behind, tail, upper=False, left=False)
        if rightwards:
            self.cores[first] = head.reshape(*whole.shape[:2], rank)
            self.cores[first + 1] = tail.unflatten(2, whole.shape[3:]).transpose(1, 2)
            self._pass_right(first, first + 1)
        else:
            self.cores[first + 1] = tail.reshape(rank, *whole.shape[3:])
            self.cores[first] = head.unflatten(0, whole.shape[:2])
            self._pass_left(first + 1, first)
        return dropped

    def write_to_(self, model: MPSClassifier) -> None:
        """Give the cores to the model."""
        for k, core in enumerate(self.cores):
            grad = model.cores[k].requires_grad
            model.cores[k] = nn.Parameter(core.contiguous(), grad)

    def _pass_right(self, site: int, to: int) -> None:
        """Compute the states behind a site; their mean norm goes from its core to the next."""
        states = step_right(self.left[site], self.features[site], self.cores[site])
        self.left[to] = states / self._scale(states, site, to)

    def _pass_left(self, site: int, to: int) -> None:
        states = step_left(self.right[site], self.features[site], self.cores[site])
        self.right[to] = states / self._scale(states, site, to)

    def _scale(self, states: Tensor, site: int, to: int) -> Tensor:
        size = states.square().sum(1).mean().sqrt()
        size = torch.where(size > 0, size, torch.ones_like(size))
        self.cores[site], self.cores[to] = self.cores[site] / size, self.cores[to] * size
        return size


def _bond(values: Tensor, most: int, cutoff: float) -> tuple[int, float]:
    """Return how many singular values stay, at least one, and the share of the squared norm that is dropped."""
    squares = values.double().square()
    total = float(squares.sum())
    if total == 0:
        return 1, 0.0
    tails = squares.flip(0).cumsum(0).flip(0) / total  # what is dropped where all from k on are
    rank = max(1, min(most, int((tails > cutoff).sum())))
    return rank, float(tails[rank]) if rank < len(tails) else 0.0
