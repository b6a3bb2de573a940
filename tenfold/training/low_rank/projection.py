"""Projection of weights onto those of low rank: the Z-step of ADMM, for any format."""

from __future__ import annotations

import abc
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tenfold.decompositions import Decomposition, FitRequest, algorithm_for, decompose_many, default_algorithm
from tenfold.errors import PlanError, naming_layer
from tenfold.formats import FORMATS, Factorization
from tenfold.layers import dense_weight, spec_of
from tenfold.records import Plan
from tenfold.surgery import find, note_in_config_, put
from tenfold.surgery.replacement import layer_of
from tenfold.tracing import copied


class Projection(nn.Module, abc.ABC):
    """A map from the weights of some layers to the nearest weights of low rank.

    A module, so that state kept between projections can live in buffers, which are stored with a run.
    """

    @property
    @abc.abstractmethod
    def paths(self) -> tuple[str, ...]:
        """The layers to project."""

    @property
    @abc.abstractmethod
    def identity(self) -> str:
        """Everything that the images depend on besides the targets, as text: it tells runs apart."""

    @abc.abstractmethod
    def plan_for(self, model: nn.Module) -> Plan:
        """Return the plan, of formats and ranks, that the last images satisfy."""

    def factorize(self, model: nn.Module) -> nn.Module:
        """Return a copy of the model with factors in place of its weights, found as for an image."""
        return PlanProjection(self.plan_for(model)).factorize(model)

    @abc.abstractmethod
    def forward(self, model: nn.Module, targets: Mapping[str, Tensor], strengths: Tensor) -> Mapping[str, Tensor]:
        """Return the images of the targets, by path, in torch's own layout.

        Args:
            model: the model whose weights the targets belong to; left unchanged.
            targets: tensors to project, by path.
            strengths: (layers,) scheduled ρ of the penalties Σ ρ/2 · ‖W − Z + U‖², without the boosts: those make
                a layer follow its image, and a layer that follows badly does not matter more.
        """


class PlanProjection(Projection):
    """The nearest weights in the formats and at the ranks of a plan, as close as the planned algorithms find them.

    Weights of equal shape are decomposed together. Iterative algorithms (CP) are warm-started from the factors of the
    last projection: another local optimum would be a jump. Data-aware algorithms are replaced by the default of the
    format: moments of another model would mislead.

    Args:
        plan: with the formats, ranks and algorithms of the factorized layers.

    Example:
        >>> from tenfold.records import Cost
        >>> layer = {"path": "0", "kind": "", "action": "factorize", "format": "low_rank", "rank": {"rank": 1}}
        >>> layer |= {"reason": "", "before": Cost(), "after": Cost()}
        >>> plan = Plan(tenfold="", model="", before=Cost(), after=Cost(), layers=[layer])
        >>> net = nn.Sequential(nn.Linear(3, 3))
        >>> image = PlanProjection(plan)(net, {"0": torch.diag(torch.tensor([3.0, 2.0, 1.0]))}, torch.ones(1))["0"]
        >>> image.diagonal().round().abs()
        tensor([3., 0., 0.])
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = weight_only(plan)

    @property
    def paths(self) -> tuple[str, ...]:
        """The factorized layers of the plan."""
        return tuple(layer.path for layer in self.plan.factorized)

    @property
    def identity(self) -> str:
        """Formats, ranks and algorithms by layer."""
        return ", ".join(f"{p.path}: {p.format} {p.rank} {p.algorithm}" for p in self.plan.factorized)

    def forward(self, model: nn.Module, targets: Mapping[str, Tensor], strengths: Tensor) -> dict[str, Tensor]:
        """Return the nearest weights at the planned ranks, by path.

        Raises:
            PlanError: a layer that cannot be factorized as planned.
        """
        del strengths  # the nearest weights do not depend on the strength of the penalty
        problems = [self._problem(i, model, targets[layer.path]) for i, layer in enumerate(self.plan.factorized)]
        fits = decompose_many(problems)
        for i, fit in enumerate(fits):
            self._remember(i, fit.value)
        return {path: fit.value.to_dense() for path, fit in zip(self.paths, fits, strict=True)}

    def plan_for(self, model: nn.Module) -> Plan:
        """Return the plan itself."""
        del model
        return self.plan

    @torch.no_grad()
    def factorize(self, model: nn.Module) -> nn.Module:
        """Return a copy of the model with factors in place of its weights, warm-started as for an image."""
        problems = [self._problem(i, model, _weight(model, layer.path)) for i, layer in enumerate(self.plan.factorized)]
        small = copied(model)
        found = zip(self.paths, problems, decompose_many(problems), strict=True)
        new = {path: layer_of(fit, find(small, path), own.algorithm) for path, own, fit in found}
        return note_in_config_(put(small, new))

    def extra_repr(self) -> str:
        """Return the formats."""
        return " and ".join(sorted({str(layer.format) for layer in self.plan.factorized}))

    def _problem(self, i: int, model: nn.Module, target: Tensor) -> FitRequest:
        layer = self.plan.factorized[i]
        spec, reason = spec_of(find(model, layer.path))
        if spec is None:
            msg = f"layer {layer.path!r} cannot be factorized: {reason}"
            raise PlanError(msg)
        format, seed = str(layer.format), self.plan.seed
        with naming_layer(layer.path):
            algorithm = algorithm_for(format, layer.algorithm, seed)
            known_factors = {n.partition("_")[2]: t for n, t in self._buffers.items() if n.startswith(f"factors{i}_")}
            start = FORMATS.get(format)(spec, **known_factors) if known_factors else None
        return FitRequest(target, spec, format, layer.rank or {}, algorithm, start=start)

    def _remember(self, i: int, value: Factorization) -> None:
        """Keep factors for a warm start, where the start matters."""
        if value.svd_bounds_error:
            return
        for name, tensor in value.tensors().items():
            key = f"factors{i}_{name}"
            if key in self._buffers:
                self.get_buffer(key).copy_(tensor)
            else:
                self.register_buffer(key, tensor.detach().clone(memory_format=torch.contiguous_format))


def weight_only(plan: Plan) -> Plan:
    """Return the plan with every data-aware algorithm replaced by the default of its format."""
    layers = []
    for layer in plan.layers:
        aware = layer.algorithm is not None and Decomposition.from_dict(layer.algorithm).uses_covariance
        known = default_algorithm(str(layer.format), plan.seed).to_dict() if aware else layer.algorithm
        layers.append(layer.replace(algorithm=known, fingerprint=None))
    return plan.replace(layers=tuple(layers))


def _weight(model: nn.Module, path: str) -> Tensor:
    return dense_weight(find(model, path)).detach()
