"""Stein variational gradient descent: a small ensemble as a sample of the posterior of a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.errors import TuningError
from tenfold.tracing.contexts import evaluating
from tenfold.tracing.inputs import call_model
from tenfold.training.loop import Loss
from tenfold.training.losses import cross_entropy

Score = Callable[[nn.Module, Any, Any], Tensor]


def stein_direction(particles: Tensor, scores: Tensor, bandwidth: float | None = None) -> Tensor:
    """Return the Stein direction (n, p) of particles (n, p), given the scores ∇ log p of their density.

    φᵢ = 1/n Σⱼ [k(xⱼ, xᵢ) ∇ log p(xⱼ) + ∇ₓⱼ k(xⱼ, xᵢ)] with k = exp(−‖xⱼ − xᵢ‖²/h): uphill together, and apart from
    each other (Liu and Wang 2016, arXiv 1608.04471, equation 8). A single particle follows the gradient.

    Args:
        particles: one per row.
        scores: of the same shape.
        bandwidth: h; by default the median of the squared distances over log n, as in the paper.

    Example:
        >>> stein_direction(torch.tensor([[-1.0], [1.0]]), torch.zeros(2, 1)).sign().flatten()  # apart
        tensor([-1.,  1.])
    """
    n = len(particles)
    if n == 1:
        return scores.clone()
    gaps = particles[:, None] - particles[None]  # (i, j, p): xᵢ − xⱼ
    squares = gaps.square().sum(-1)
    if bandwidth is None:
        others = squares[~torch.eye(n, dtype=torch.bool, device=squares.device)]
        bandwidth = max(float(others.median()) / math.log(n), 1e-12)
    kernel = (-squares / bandwidth).exp()
    apart = (kernel[..., None] * gaps).sum(1) * (2 / bandwidth)
    return (kernel @ scores + apart) / n


class Ensemble(nn.Module):
    """Networks of one architecture, as a sample of the posterior.

    Returns the log of the mean class probabilities, as cross-entropy and accuracy take them. Trained with ``loss``, in
    ``finetune`` or any other loop, the members follow Stein variational gradient descent.

    Args:
        members: one or more, from different seeds, with parameters of equal names and shapes.

    Raises:
        TuningError: members that differ, or none.

    Example:
        >>> from tenfold.training import TuneConfig, finetune
        >>> ensemble = Ensemble([nn.Linear(2, 2) for _ in range(3)])
        >>> x = torch.randn(64, 2)
        >>> data = [(x, (x[:, 0] > 0).long())]
        >>> config = TuneConfig(epochs=20, lr=0.5, clip_norm=None)
        >>> result = finetune(ensemble, data, config, loss=ensemble.loss(samples=64))
        >>> log_likelihood(ensemble, data) > -0.69  # better than not knowing
        True
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        shapes = [[(name, p.shape) for name, p in m.named_parameters()] for m in self.members]
        if not shapes or any(s != shapes[0] for s in shapes):
            msg = "an ensemble has one or more members with parameters of the same names and shapes"
            raise TuningError(msg)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return log mean softmax (samples, classes) over the members."""
        scores = torch.stack([member(*args, **kwargs).float().log_softmax(-1) for member in self.members])
        return scores.logsumexp(0) - math.log(len(self.members))

    def particles(self) -> Tensor:
        """Return the trained parameters, one row (p,) per member."""
        return torch.stack([torch.cat([p.flatten() for p in m.parameters() if p.requires_grad]) for m in self.members])

    def loss(
        self,
        samples: int,
        negative_log_likelihood: Score | None = None,
        negative_log_prior: Callable[[nn.Module], Tensor] | None = None,
        bandwidth: float | None = None,
    ) -> Loss:
        """Return the mean loss of the members, with the negative Stein direction over N as its gradient.

        Args:
            samples: N, size of the training set.
            negative_log_likelihood: mean over the samples of a batch, of one member; cross-entropy by default.
            negative_log_prior: of one member, all of it; none by default.
            bandwidth: of the kernel; the median rule by default.
        """
        likelihood = negative_log_likelihood or cross_entropy()

        def stein(called: nn.Module, inputs: Any, targets: Any) -> Tensor:
            del called
            values, scores = [], []
            for member in self.members:
                value = likelihood(member, inputs, targets)
                if negative_log_prior is not None:
                    value = value + negative_log_prior(member) / samples
                trained = [p for p in member.parameters() if p.requires_grad]
                found = torch.autograd.grad(value, trained)
                scores.append(torch.cat([g.flatten() for g in found]) * -samples)
                values.append(value.detach())
            particles = self.particles()
            direction = stein_direction(particles.detach(), torch.stack(scores), bandwidth) / samples
            slope = (direction * particles).sum()
            return torch.stack(values).mean() - (
                slope - slope.detach()
            )  # the value of the first, the gradient of the second

        return stein


def log_likelihood(model: nn.Module, batches: Iterable[tuple[Any, Tensor]]) -> float:
    """Return the mean of log p(label | input) over all samples, for a model or an ensemble, in evaluation mode.

    Raises:
        TuningError: there is no sample.
    """
    total, count = 0.0, 0
    with evaluating(model):
        for inputs, targets in batches:
            total -= float(F.cross_entropy(call_model(model, inputs).float(), targets, reduction="sum"))
            count += len(targets)
    if not count:
        msg = "there is no sample to predict"
        raise TuningError(msg)
    return total / count
