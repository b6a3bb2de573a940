"""Build the factorized replacement of a layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tenfold.decompositions import Decomposition, Fit, Moments
from tenfold.errors import PlanError, naming_layer
from tenfold.formats import FORMATS
from tenfold.layers import FactorizedLayer, FitSummary, dense_weight, spec_of
from tenfold.records import LayerPlan, LayerSpec
from tenfold.tracing.layers import entries


def factorizable_spec(module: nn.Module, path: str = "") -> LayerSpec:
    """Return the geometry of a layer that can be factorized; ``path`` is for the error.

    Raises:
        PlanError: it cannot.
    """
    spec, reason = (module.spec, "") if isinstance(module, FactorizedLayer) else spec_of(module)
    if spec is None:
        msg = f"{f'layer {path!r}' if path else 'the layer'} cannot be factorized: {reason}"
        raise PlanError(msg)
    return spec


def geometry(module: nn.Module, path: str = "") -> tuple[LayerSpec, Tensor]:
    """Return geometry and dense weight of a layer that can be factorized; see ``factorizable_spec``."""
    spec = factorizable_spec(module, path)
    with torch.no_grad():
        return spec, dense_weight(module)


def metric_for(module: nn.Module, metric: Moments | None) -> Moments | None:
    """Return the moments by which a layer is fitted: about zero without a bias, as nothing can take a shift then."""
    return metric if metric is None or getattr(module, "bias", None) is not None else metric.uncentered()


def layer_of(fit: Fit, old: nn.Module, algorithm: Decomposition | None = None) -> FactorizedLayer:
    """Return the factorized layer of a fit: with the bias of the layer that it replaces, and trainable like that.

    Args:
        fit: of the weight of ``old``; a shift of the mean goes into the bias, if there is one.
        old: stays as it is.
        algorithm: what found the factors, recorded in ``fit`` of the layer.
    """
    bias: Tensor | None = getattr(old, "bias", None)
    if bias is not None and fit.bias_shift is not None:
        bias = (bias.detach().double() + fit.bias_shift).to(bias.dtype).requires_grad_(bias.requires_grad)
    layer = FactorizedLayer.of(fit.value, bias, requires_grad=trainable(old))
    layer.fit = FitSummary(
        fit.rel_error,
        fit.n_iter,
        fit.converged,
        fit.note,
        fit.stability,
        None if algorithm is None else algorithm.to_dict(),
    )
    return layer


def trainable(layer: nn.Module) -> tuple[bool, bool]:
    """Return whether the weights and the bias of a layer are trained."""
    named = list(layer.named_parameters())
    weight, bias = (any(p.requires_grad for name, p in named if name.endswith(end)) for end in ("weight", "bias"))
    return weight, bias


def check_planned(layer: LayerPlan, spec: LayerSpec) -> None:
    """Raise PlanError if a plan names a format that does not exist, or was made for a layer of another geometry."""
    if layer.kind and layer.kind != str(spec):
        msg = f"layer {layer.path!r} is {layer.kind} in the plan and {spec} in the model: another model's plan"
        raise PlanError(msg)
    with naming_layer(layer.path):
        FORMATS.get(str(layer.format))


def refuse_tied(model: nn.Module, wanted: Sequence[LayerPlan]) -> None:
    """Raise PlanError if a layer shares a parameter with another: factorizing it would untie them."""
    tied = {entry.path: entry.tied for entry in entries(model) if entry.tied}
    for layer in wanted:
        if layer.path in tied:
            others = ", ".join(tied[layer.path])
            msg = f"layer {layer.path!r} shares a parameter with {others}: factorizing it would untie them. Keep it."
            raise PlanError(msg)
