"""Rewrite factorized convolutions of a network as the blocks of architectures, and convolutions as factorized ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.decompositions import Moments, decompose
from tenfold.errors import PlanError, UnknownNameError
from tenfold.formats import FORMATS
from tenfold.layers import FactorizedLayer
from tenfold.networks.conv_block import ARCHITECTURES, ConvBlock, undone_
from tenfold.registry import did_you_mean
from tenfold.surgery.modules import find, put
from tenfold.surgery.replacement import geometry, layer_of, metric_for
from tenfold.tracing import copied
from tenfold.tracing.contexts import evaluating
from tenfold.tracing.inputs import call_model


def as_block(
    conv: nn.Module, architecture: str, rank: Mapping[str, int], moments: Moments | None = None, **options: bool
) -> ConvBlock:
    """Return a trained convolution as the block of an architecture: factorized, with identities between its stages.

    Use it for one layer by hand; ``as_blocks`` does it for all that a plan has factorized.

    Args:
        conv: a convolution with a kernel above 1; stays as it is.
        architecture: ``bottleneck`` (Tucker-2), ``mobilenet`` (CP) or ``resnext`` (block terms).
        rank: of that format: ``out`` and ``in``; ``rank``; or ``blocks``, ``out`` and ``in``.
        moments: of its inputs; with these the error of the outputs is fitted.
        options: ``norms`` and ``activations``, as ``ConvBlock.of`` takes them.

    Raises:
        UnknownNameError: an architecture that does not exist.
        PlanError: a layer that cannot be factorized so.
        RankError: ranks outside of what the kernel allows.

    Example:
        >>> conv, x = nn.Conv2d(8, 8, 3, padding=1), torch.randn(2, 8, 5, 5)
        >>> block = as_block(conv, "bottleneck", {"out": 8, "in": 7}).eval()
        >>> [type(module).__name__ for module in block]
        ['Conv2d', 'BatchNorm2d', 'PReLU', 'Conv2d']
    """
    if architecture not in ARCHITECTURES:
        msg = f"there is no architecture {architecture!r}. {did_you_mean(architecture, ARCHITECTURES)}"
        raise UnknownNameError(msg)
    spec, weight = geometry(conv)
    format = ARCHITECTURES[architecture]
    reason = FORMATS.get(format).unsupported_reason(spec)
    if reason:
        msg = f"{spec} does not become a {architecture} block: {reason}"
        raise PlanError(msg)
    fit = decompose(weight, format, dict(rank), spec=spec, moments=metric_for(conv, moments))
    return ConvBlock.of(layer_of(fit, conv), **options).train(conv.training)


def as_blocks(
    model: nn.Module, batches: Iterable[Any] | None = None, *, norms: bool = True, activations: bool = True
) -> nn.Module:
    """Return a copy of a compressed model whose factorized convolutions are blocks; in evaluation it computes the same.

    Layers in the formats ``tucker2``, ``cp3`` and ``block_term`` become blocks, all others stay. Use it before a long
    training; for a few epochs the factors as they are do as well. Save its state dict: the same call on the same
    compressed model makes the structure to load it into.

    Args:
        model: stays as it is.
        batches: inputs as its forward takes them, for the statistics of the norms: with these the copy computes nearly
            the same in training mode too. Without these batches of training are normalised by themselves.
        norms: whether batch norms are inserted.
        activations: whether PReLUs are.

    Raises:
        PlanError: no layer of the model can be a block.
    """
    layers = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, FactorizedLayer) and module.format in ARCHITECTURES.values() and len(module.stages) > 1
    }
    if not layers:
        msg = f"no layer of the model is a block: factorize some by {', '.join(ARCHITECTURES.values())} first"
        raise PlanError(msg)
    blocks: dict[str, nn.Module] = {
        path: ConvBlock.of(layer, norms=norms, activations=activations) for path, layer in layers.items()
    }
    made = put(copied(model), blocks)
    if batches is not None and norms:
        _settle_(made, [norm for path in blocks for norm in _block(made, path).norms], batches)
    return made


def _block(model: nn.Module, path: str) -> ConvBlock:
    block = find(model, path)
    assert isinstance(block, ConvBlock)  # noqa: S101 - as it was put there
    return block


@torch.no_grad()
def _settle_(model: nn.Module, norms: list[nn.Module], batches: Iterable[Any]) -> None:
    """Give norms the statistics of their inputs, all of them identities as before."""
    sums = [[0.0, 0.0, 0] for _ in norms]  # of values, of squares, of how many

    def seeing(at: int) -> Callable[..., None]:
        def see(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].double().movedim(1, 0).flatten(1)
            own: list[Any] = sums[at]
            own[0], own[1], own[2] = own[0] + rows.sum(1), own[1] + rows.square().sum(1), own[2] + rows.shape[1]

        return see

    handles = [norm.register_forward_pre_hook(seeing(at)) for at, norm in enumerate(norms)]
    try:
        with evaluating(model):
            for inputs in batches:
                call_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    for norm, (total, square, count) in zip(norms, sums, strict=True):
        if count:
            mean: Any = total / count
            undone_(norm, mean, (square / count - mean**2).clamp_min(0))
