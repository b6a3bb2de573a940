"""Let equally shaped convolutions of a trained network take their kernels from one factorized tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from tenfold.decompositions import Moments
from tenfold.errors import BudgetError, PlanError
from tenfold.formats import Tucker2
from tenfold.layers import FactorizedLayer, dense_weight, spec_of
from tenfold.networks import BankProblem, KernelBank, SharedConv, TuckerBank, choose_ranks, fit_bank_
from tenfold.networks.kernel_bank import unshared
from tenfold.patterns import first_match
from tenfold.records import LayerSpec
from tenfold.surgery.modules import find, put
from tenfold.surgery.replacement import metric_for
from tenfold.tracing import copied
from tenfold.tracing.layers import entries

Groups = Mapping[str, Sequence[str]]


def equal_kernels(model: nn.Module, keep: Iterable[str] = ()) -> dict[str, tuple[str, ...]]:
    """Return the paths of convolutions by the shape of their kernels, in order, where several have the same one.

    Convolutions without groups whose taps are more than one; strides and dilations may differ, for a bank knows kernels
    only. Layers that share parameters with others already are left out.

    Args:
        model: any module.
        keep: patterns of paths that stay as they are.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, stride=2))
        >>> equal_kernels(net)
        {'8×8×3×3': ('1', '2')}
    """
    kept, found = tuple(keep), dict[str, list[str]]()
    for layer in entries(model):
        spec = layer.spec if type(layer.module) is not SharedConv else None
        if spec is None or unshared(spec) or spec.pointwise or layer.tied or layer.aliases:
            continue
        if spec_of(layer.module)[0] is not None and first_match(kept, layer.path) is None:
            found.setdefault("×".join(map(str, spec.weight_shape)), []).append(layer.path)
    return {shape: tuple(paths) for shape, paths in found.items() if len(paths) > 1}


def share_kernels(
    model: nn.Module,
    params: int | None = None,
    *,
    groups: Groups | None = None,
    ranks: Mapping[str, Mapping[str, int]] | None = None,
    moments: Mapping[str, Moments] | None = None,
    kind: type[KernelBank] = TuckerBank,
    steps: int = 100,
) -> nn.Module:
    """Return a copy of a model whose equally shaped convolutions take their kernels from shared banks.

    Use it where depth repeats layers, as in residual networks, and the parameters of the file or the device count: the
    factors of the channels are there once for all layers of a shape. Multiplications are those of Tucker-2 at the same
    ranks. The copy holds plain parameters: train it, save its state dict, and load that into the copy that the same
    ``ranks`` make of a skeleton (with ``steps=0``).

    Args:
        model: stays as it is.
        params: parameters that the whole copy may have; decides the ranks. Give this or ``ranks``.
        groups: paths of the layers of each bank, by any name; ``equal_kernels(model)`` by default.
        ranks: of each bank, by the name of its group: ``layers``, ``out`` and ``in``, full where left out.
        moments: of the layers' inputs, by path, as ``calibrate`` finds them: then the error of the outputs is fitted,
            of all layers of a bank together; without these the weights alone decide.
        kind: ``TuckerBank``, or ``TrainBank``.
        steps: of the joint fit at most.

    Raises:
        PlanError: neither or both of ``params`` and ``ranks``, or layers that cannot share.
        BudgetError: parameters that cannot be met.
        RankError: ranks outside of what the kernels allow.

    Example:
        >>> net = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)))
        >>> small = share_kernels(net, 1000)
        >>> sum(p.numel() for p in net.parameters()), sum(p.numel() for p in small.parameters()) <= 1000
        (2336, True)
    """
    groups = equal_kernels(model) if groups is None else groups
    if (params is None) == (ranks is None):
        msg = "give params, how many parameters may stay, or ranks of each group: one of both"
        raise PlanError(msg)
    if not groups:
        msg = "no two convolutions have kernels of one shape: there is nothing to share. Factorize layers one by one."
        raise PlanError(msg)
    specs = {path: _spec(model, path) for paths in groups.values() for path in paths}
    problems = {name: _problem(model, paths, moments) for name, paths in groups.items()}
    if ranks is None:
        ranks = _within(model, problems, specs, params or 0, kind)
    unknown = sorted(set(ranks) - set(groups))
    if unknown:
        msg = f"ranks name the groups {', '.join(unknown)}; there are {', '.join(groups)}"
        raise PlanError(msg)
    new: dict[str, nn.Module] = {}
    for name, problem in problems.items():
        if name not in ranks:
            continue
        first = find(model, groups[name][0]).get_parameter("weight")
        layers, out, inner, *kernel = problem.weights.shape
        bank = kind(layers, out, inner, kernel, ranks[name], device=first.device, dtype=first.dtype)
        fit_bank_(bank, problem, steps=steps)
        for index, path in enumerate(groups[name]):
            bias = find(model, path)._parameters.get("bias")
            own = None if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad)
            new[path] = SharedConv(bank, index, specs[path], own).train(find(model, path).training)
    return put(copied(model), new)


def unshare_kernels(model: nn.Module) -> nn.Module:
    """Return a copy in which each shared convolution has a kernel of its own, in the format ``tucker2``.

    Use it for what runs: the cores are multiplied out once and not in every forward, exports and latency tables know
    these layers, and parameters are then those of every layer.

    Example:
        >>> net = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)))
        >>> small = unshare_kernels(share_kernels(net, 1000))
        >>> type(small[0]).__name__, small[0].format
        ('FactorizedLayer', 'tucker2')
    """
    new: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, SharedConv):
            bank = module.bank
            outer, inner = (None if factor is None else factor[None] for factor in (bank.outer, bank.inner))
            value = Tucker2(module.spec, bank.core(module.index)[None], outer, inner)
            new[path] = FactorizedLayer.of(value, module.bias).train(module.training)
    return put(copied(model), new)


def bank_ranks(model: nn.Module) -> dict[str, dict[str, int]]:
    """Return the ranks of the banks in a model, by the shape of their kernels: what ``share_kernels`` takes."""
    banks = (module for module in model.modules() if isinstance(module, KernelBank))
    return {"×".join(map(str, bank.full_shape[1:])): dict(bank.ranks) for bank in banks}


def _spec(model: nn.Module, path: str) -> LayerSpec:
    spec, reason = spec_of(find(model, path))
    reason = reason or unshared(spec)
    if spec is None or reason:
        msg = f"layer {path!r} cannot take its kernel from a bank: {reason}"
        raise PlanError(msg)
    return spec


def _problem(model: nn.Module, paths: Sequence[str], moments: Mapping[str, Moments] | None) -> BankProblem:
    modules = [find(model, path) for path in paths]
    with torch.no_grad():
        weights = [dense_weight(module).cpu() for module in modules]
    if moments is None:
        return BankProblem.of(weights)
    missing = [path for path in paths if path not in moments]
    if missing:
        msg = f"there are no moments of {', '.join(missing)}: calibrate all layers of a group, or leave moments out"
        raise PlanError(msg)
    known = (metric_for(module, moments[path]) for module, path in zip(modules, paths, strict=True))
    return BankProblem.of(weights, [metric.to("cpu") for metric in known if metric is not None])


def _within(
    model: nn.Module,
    problems: Mapping[str, BankProblem],
    specs: Mapping[str, LayerSpec],
    params: int,
    kind: type[KernelBank],
) -> dict[str, dict[str, int]]:
    """Return the ranks with which the whole model has at most so many parameters."""
    whole = sum(parameter.numel() for parameter in model.parameters())
    rest = whole - sum(spec.replace(bias=False).num_params for spec in specs.values())
    if params <= rest:
        msg = f"params={params:,} is not above the {rest:,} parameters outside of the shared kernels: raise it"
        raise BudgetError(msg)
    found = choose_ranks(list(problems.values()), params - rest, kind)
    return dict(zip(problems, found, strict=True))
