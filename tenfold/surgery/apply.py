"""Carry out a plan, take factorized layers out again, and rebuild their structure for loading. Dull and exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from tenfold.decompositions import Fit, FitRequest, Moments, algorithm_for, fit_batches, layer_request
from tenfold.errors import TenfoldError, naming_layer
from tenfold.formats import FORMATS
from tenfold.layers import FactorizedLayer, FitSummary, build
from tenfold.parallel import Workers
from tenfold.records import LayerPlan, Plan
from tenfold.surgery.fuse_batchnorm import check_pairs, fuse_pairs_
from tenfold.surgery.modules import find, put
from tenfold.surgery.narrow import absorb_, check_units, narrow_
from tenfold.surgery.replacement import (
    check_planned,
    factorizable_spec,
    geometry,
    layer_of,
    metric_for,
    refuse_tied,
    trainable,
)
from tenfold.surgery.separate import separate_
from tenfold.tensors import normal_tensors, plain_arithmetic
from tenfold.tracing import copied

Progress = Callable[[int, int], None]
Job = tuple[FitRequest, Callable[[Fit], Fit]]

_ALONE = "; fitted on its own: "


@normal_tensors()
def apply(
    model: nn.Module,
    plan: Plan,
    *,
    moments: Mapping[str, Moments] | None = None,
    progress: Progress | None = None,
    workers: Workers | None = None,
) -> nn.Module:
    """Return a new model in which the plan is carried out; ``model`` itself stays as it is.

    The result is an ordinary module: train it with any loop. Each factorized layer tells in ``fit`` how well it met
    the weight that it replaced.

    Args:
        model: the model that the plan was made for.
        plan: which layers to factorize, into what, at which rank.
        moments: of the inputs of the layers, by path: then the factors minimise the error of the output instead of
            that of the weight, and the bias takes the shift of the mean. ``apply_sequentially`` uses the data better.
        progress: called with (layers done, layers in all).
        workers: who decomposes the layers of a model on the CPU; this process if None.

    Raises:
        PlanError: a layer of the plan is not in the model, or cannot be factorized as the plan says.
    """
    twin = separate_(copied(model), plan.unrolled)
    return apply_(twin, plan, moments=moments, progress=progress, workers=workers)


def apply_(
    model: nn.Module,
    plan: Plan,
    *,
    moments: Mapping[str, Moments] | None = None,
    progress: Progress | None = None,
    workers: Workers | None = None,
) -> nn.Module:
    """Carry out the plan in place and return the model; on an error the model is as it was. See ``apply``.

    Layers that the plan has opened are to be open: see ``separate_``.
    """
    wanted = plan.factorized
    for layer in plan.layers:
        find(model, layer.path)
    check_pairs(model, plan.fused)
    check_units(model, plan)
    pivots = {unit.pivot: find(model, unit.pivot) for unit in plan.narrowed}
    jobs = [_job(model, layer, plan.seed, (moments or {}).get(layer.path)) for layer in wanted]
    refuse_tied(model, wanted)
    fits = _decompose(jobs, wanted, progress, workers)
    new = {
        layer.path: layer_of(fit, find(model, layer.path), request.algorithm)
        for layer, fit, (request, _) in zip(wanted, fits, jobs, strict=True)
    }
    return fuse_pairs_(absorb_(put(model, new), plan, pivots), plan.fused)


def restructure_(model: nn.Module, plan: Plan) -> nn.Module:
    """Give the model the structure of the plan, with uninitialised factors, in place: to load weights into it.

    Layers that the plan keeps in a format that they had before get that structure too.

    Raises:
        PlanError: a layer of the plan is not in the model, or has another geometry than the plan says.
    """
    new: dict[str, nn.Module] = {}
    model = narrow_(separate_(model, plan.unrolled), plan.narrowed)
    fuse_pairs_(model, plan.fused)
    pivots = {unit.pivot for unit in plan.narrowed}
    for layer in plan.layers:
        if layer.format is None or layer.path in pivots:
            continue
        old = find(model, layer.path)
        spec, weight = geometry(old, layer.path)
        check_planned(layer, spec)
        with naming_layer(layer.path):
            new[layer.path] = FactorizedLayer.empty(
                spec, str(layer.format), layer.rank or {}, like=weight, requires_grad=trainable(old)
            )
    return put(model, new)


def densify(model: nn.Module) -> nn.Module:
    """Return a new model with a plain dense layer in place of every factorized one."""
    return densify_(copied(model))


@plain_arithmetic()
def densify_(model: nn.Module) -> nn.Module:
    """Put a plain dense layer in place of every factorized one, in place; return the model."""
    layers = {path: m for path, m in model.named_modules() if isinstance(m, FactorizedLayer)}
    return put(model, {path: _dense(layer) for path, layer in layers.items()})


def fits_of(model: nn.Module) -> dict[str, FitSummary]:
    """Return by path how the layers of a model that replaced others met their weights, as far as that is known."""
    fits = ((path, getattr(module, "fit", None)) for path, module in model.named_modules())
    return {path: fit for path, fit in fits if isinstance(fit, FitSummary)}


def with_errors(plan: Plan, model: nn.Module) -> Plan:
    """Return the plan with what was done: by which algorithm, with which relative error, and how stable factors are."""
    fits = fits_of(model)
    layers = (_told(layer, fits[layer.path]) if layer.action == "factorize" else layer for layer in plan.layers)
    return plan.replace(layers=tuple(layers))


def _told(layer: LayerPlan, fit: FitSummary) -> LayerPlan:
    """Return the plan of a layer with its error.

    The reason says why the layer was fitted on its own, and how stable factors are that could diverge.
    """
    reason = layer.reason.partition("; sensitivity ")[0].partition(_ALONE)[0]
    if fit.alone:
        reason = f"{reason}{_ALONE}{fit.alone}"
    if fit.stability is not None:
        reason = f"{reason}; {fit.stability}"
    updated = layer.replace(rel_error=fit.rel_error, reason=reason, algorithm=fit.algorithm or layer.algorithm)
    return updated if layer.edited else updated.replace(fingerprint=None)


def _job(model: nn.Module, layer: LayerPlan, seed: int, moments: Moments | None) -> Job:
    """Return what to decompose for a layer, and what makes of the fit one of the layer's own weight."""
    module = find(model, layer.path)
    spec = factorizable_spec(module, layer.path)
    check_planned(layer, spec)
    format, rank = str(layer.format), layer.rank or {}
    with naming_layer(layer.path), torch.no_grad():
        algorithm = algorithm_for(format, layer.algorithm, seed, data_aware=moments is not None)
        FORMATS.get(format).check_rank(spec, rank)
        weight = module.factorization() if isinstance(module, FactorizedLayer) else geometry(module, layer.path)[1]
        return layer_request(weight, format, rank, algorithm, spec=spec, moments=metric_for(module, moments))


def _decompose(
    jobs: Sequence[Job], wanted: Sequence[LayerPlan], progress: Progress | None, workers: Workers | None
) -> list[Fit]:
    """Decompose all layers; equal ones together. An error names its layer."""
    fits: dict[int, Fit] = {}
    for members, results in fit_batches([request for request, _ in jobs], workers):
        for i, result in zip(members, results, strict=True):
            with naming_layer(wanted[i].path):
                if isinstance(result, TenfoldError):
                    raise result
                fits[i] = jobs[i][1](result)
        if progress is not None:
            progress(len(fits), len(jobs))
    return [fits[i] for i in range(len(jobs))]


def _dense(layer: FactorizedLayer) -> nn.Module:
    grads = any(p.requires_grad for n, p in layer.named_parameters() if n.endswith("weight"))
    weight = nn.Parameter(layer.weight.detach().clone(memory_format=torch.contiguous_format), grads)
    bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), layer.bias.requires_grad)
    return build(layer.spec, weight, bias)
