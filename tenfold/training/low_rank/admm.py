"""ADMM: train a dense model to low rank, for any training loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from tenfold.errors import PlanError, TuningError
from tenfold.layers import FactorizedLayer, dense_weight, own_layout
from tenfold.records import Plan, Record
from tenfold.surgery import find
from tenfold.training.low_rank.projection import PlanProjection, Projection

MOST_BOOST = 100.0  # a stronger penalty drowns the loss
ARRIVE = 0.8  # share of the updates after which distances should have reached their final value


class AdmmConfig(Record):
    """Strength of the penalty that draws weights to low rank.

    Attributes:
        rho: initial strength, relative to the weights: a layer at the relative distance d = 1 from its low-rank image
            adds rho/2 to the loss. Suits losses around one, such as a cross-entropy.
        last_rho: strength at the last of the ``updates``, reached geometrically. A strong penalty from the start
            freezes the weights, a weak one leaves a distance at the end.
        updates: number of updates; the strength is constant afterwards.
        fall: target for the final distance ‖W − Z‖, as a share of the initial one, on a geometric path that ends after
            four fifths of the updates (learning rates are low by then).
        boost: factor on the strength of a single layer, applied at every update that finds it behind that path, and
            taken back where it is ahead by ``slack``: learning rates and losses differ too much for one strength to
            suit all layers.
        slack: see ``boost``.
        ceiling: largest absolute strength (that is, rho/‖W‖²); None for no limit. Plain gradient steps diverge above
            1/lr; ``train_admm`` stays at a third of that.

    Example:
        >>> AdmmConfig(rho=0.1).replace(updates=30).last_rho
        10.0
    """

    rho: PositiveFloat = 0.1
    last_rho: PositiveFloat = 10.0
    updates: PositiveInt = 20
    fall: Annotated[float, Field(gt=0, lt=1)] = 0.01
    boost: Annotated[float, Field(ge=1)] = 2.0
    slack: Annotated[float, Field(ge=1)] = 3.0
    ceiling: PositiveFloat | None = None


@dataclass(frozen=True)
class Residual:
    """Residuals of a layer: ``primal`` ‖W − Z‖/‖W‖, ``dual`` ‖Z − Z′‖/‖W‖ (movement of the image), and its rho."""

    primal: float
    dual: float
    rho: float


class Admm(nn.Module):
    """Penalty and updates that draw the weights of a dense model to low rank (method of multipliers).

    min loss(W) over W = Z, Z of low rank, by alternation (Yin et al. 2021, arXiv 2107.12422; Boyd et al. 2011):

    - W: gradient steps on loss(W) + ``penalty(model)``, Σ ρ/2 · ‖W − Z + U‖² over the layers;
    - ``update(model)``: Z ← projection of W + U onto weights of the target ranks, then U ← U + W − Z.

    The set of low-rank weights is not convex, and nothing is proven: watch ``residuals``. They should fall tenfold
    before the model is decomposed; stop by the score of the model under ``projected``. Exempt these weights from
    weight decay, which draws them elsewhere.

    All state is in buffers, so ``state_dict`` and ``load_state_dict`` store and restore a run.

    Args:
        model: dense and trainable in the layers of the projection.
        projection: a plan with the target formats and ranks; or any ``Projection``.
        config: ``AdmmConfig()`` by default.

    Raises:
        PlanError: a layer that is not in the model, is factorized already, or nothing to factorize.
        TuningError: a weight that does not require grad.

    Example:
        >>> from tenfold.planning import plan
        >>> from tenfold.profiling import profile
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(16, 16))
        >>> target = plan(net, profile(net, torch.zeros(1, 16)), {"rule": {"name": "fixed", "ranks": {"0": 4}}})
        >>> admm = Admm(net, target, AdmmConfig(rho=10.0))
        >>> before = admm.residuals["0"].primal
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> for _ in range(10):
        ...     for _ in range(10):
        ...         admm.penalty(net).backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        ...     residuals = admm.update(net)
        >>> residuals["0"].primal < 0.1 * before
        True
    """

    residual: Tensor
    dual: Tensor
    first: Tensor
    boosts: Tensor
    norms: Tensor
    updates: Tensor

    def __init__(self, model: nn.Module, projection: Plan | Projection, config: AdmmConfig | None = None) -> None:
        super().__init__()
        self.config = config or AdmmConfig()
        self.projection: Projection = PlanProjection(projection) if isinstance(projection, Plan) else projection
        self.paths = tuple(self.projection.paths)
        if not self.paths:
            msg = "no layer is to be factorized: there is no low rank to train to"
            raise PlanError(msg)
        weights = self._weights(model)
        for i, weight in enumerate(weights.values()):
            image = weight.detach().to(_wide(weight), copy=True, memory_format=torch.contiguous_format)
            self.register_buffer(f"z{i}", image)
            self.register_buffer(f"u{i}", torch.zeros_like(image))
        norms = torch.stack([w.detach().float().square().sum() for w in weights.values()])
        self.register_buffer("norms", torch.where(norms > 0, norms, torch.ones_like(norms)))
        self.register_buffer("boosts", torch.ones_like(norms))
        self.register_buffer("residual", torch.zeros_like(norms))
        self.register_buffer("dual", torch.zeros_like(norms))
        self.register_buffer("first", torch.zeros_like(norms))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=norms.device))
        targets = {path: self._z(i).clone() for i, path in enumerate(self.paths)}
        images = self.projection(model, targets, self._scheduled() / self.norms)
        self._move(weights, images)
        self.first.copy_(self.residual)

    @property
    def residuals(self) -> dict[str, Residual]:
        """Residuals at the last update, by path."""
        rows = zip(self.paths, self.residual.tolist(), self.dual.tolist(), self._rhos().tolist(), strict=True)
        return {path: Residual(primal, dual, rho) for path, primal, dual, rho in rows}

    def penalty(self, model: nn.Module) -> Tensor:
        """Return Σ ρ/2 · ‖W − Z + U‖², a scalar to add to the loss; gradients flow to the weights of the model."""
        weights = self._weights(model).values()
        parts = [(w.to(self._z(i).dtype) - self._z(i) + self._u(i)).square().sum() for i, w in enumerate(weights)]
        apart = torch.stack(parts)
        return 0.5 * (apart * self._strengths().to(apart.dtype)).sum()

    @torch.no_grad()
    def update(self, model: nn.Module) -> dict[str, Residual]:
        """Update Z and U, and return the residuals by path; usually once per epoch.

        Raises:
            PlanError: the model lacks a layer.
            WeightError: a weight with NaN or infinite entries.
        """
        weights = self._weights(model)
        targets = {p: w.to(self._z(i).dtype) + self._u(i) for i, (p, w) in enumerate(weights.items())}
        former = self._strengths()
        self._move(weights, self.projection(model, targets, self._scheduled() / self.norms))
        for i, weight in enumerate(weights.values()):
            self._u(i).add_(weight.to(self._z(i).dtype) - self._z(i))
        self.updates += 1
        self._adapt()
        for i, share in enumerate((former / self._strengths()).tolist()):
            self._u(i).mul_(share)  # scaled multipliers: ρU stays
        return self.residuals

    @contextmanager
    def projected(self, model: nn.Module) -> Iterator[nn.Module]:
        """Temporarily replace the weights by their low-rank images."""
        weights = self._weights(model)
        with plugged({find(model, path): self._z(i) for i, path in enumerate(weights)}):
            yield model

    def extra_repr(self) -> str:
        """Return the number of layers."""
        return f"{len(self.paths)} layers"

    def _weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the trained weights by path, in the dtype of the model and in torch's layout."""
        weights = {}
        for path in self.paths:
            module = find(model, path)
            if isinstance(module, FactorizedLayer):
                msg = f"layer {path!r} is factorized already: train the dense model (densify), or tune this one"
                raise PlanError(msg)
            weight = getattr(module, "weight", None)
            if not isinstance(weight, nn.Parameter) or not weight.requires_grad:
                msg = f"layer {path!r} has no weight that requires grad: it cannot be trained to low rank"
                raise TuningError(msg)
            weights[path] = dense_weight(module)
        return weights

    def _move(self, weights: Mapping[str, Tensor], images: Mapping[str, Tensor]) -> None:
        """Set new images and both residuals."""
        for i, (path, weight) in enumerate(weights.items()):
            image, old = images[path].to(self._z(i).dtype), self._z(i)
            norm = float(weight.detach().double().norm()) or 1.0
            self.dual[i] = float((image - old).double().norm()) / norm
            self.residual[i] = float((weight.detach().to(image.dtype) - image).double().norm()) / norm
            old.copy_(image)

    def _adapt(self) -> None:
        """Boost layers that are behind their path, and relax boosted layers that are far ahead of it."""
        config = self.config
        path = self.first * config.fall ** (self.updates / (ARRIVE * config.updates)).clamp(max=1.0)
        behind, ahead = self.residual > path, self.residual * config.slack < path
        most = torch.full_like(self.boosts, MOST_BOOST)
        if config.ceiling is not None:
            most = most.minimum(config.ceiling * self.norms / self._scheduled()).clamp(min=1.0)
        self.boosts[behind] = (self.boosts * config.boost).minimum(most)[behind]
        self.boosts[ahead] = (self.boosts[ahead] / config.boost).clamp(min=1.0)

    def _scheduled(self) -> Tensor:
        """Return the relative strength without boosts, as a tensor: no wait for the device."""
        config = self.config
        share = (self.updates / max(config.updates - 1, 1)).clamp(max=1.0)
        return config.rho * (config.last_rho / config.rho) ** share

    def _rhos(self) -> Tensor:
        rhos, ceiling = self.boosts * self._scheduled(), self.config.ceiling
        return rhos if ceiling is None else rhos.minimum(ceiling * self.norms)

    def _strengths(self) -> Tensor:
        """Return the absolute strength ρ of each layer."""
        return self._rhos() / self.norms

    def _z(self, i: int) -> Tensor:
        return self.get_buffer(f"z{i}")

    def _u(self, i: int) -> Tensor:
        return self.get_buffer(f"u{i}")


@contextmanager
def plugged(values: Mapping[nn.Module, Tensor]) -> Iterator[None]:
    """Temporarily replace the weights of layers, in their own dtype and layout."""
    parameters: dict[nn.Module, nn.Parameter] = {module: module.weight for module in values}  # type: ignore[misc]
    kept = {module: parameter.data for module, parameter in parameters.items()}
    try:
        for module, parameter in parameters.items():
            parameter.data = torch.empty_like(parameter.data).copy_(own_layout(module, values[module]))
        yield
    finally:
        for module, data in kept.items():
            parameters[module].data = data


def _wide(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)
