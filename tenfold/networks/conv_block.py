"""A factorized convolution as a block of an architecture: norms and activations between its stages."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from tenfold.errors import PlanError
from tenfold.layers import FactorizedLayer

# What the stages of a format are called where they are designed by hand.
ARCHITECTURES: dict[str, str] = {"bottleneck": "tucker2", "mobilenet": "cp3", "resnext": "block_term"}

_NORMS: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class ConvBlock(nn.Sequential):
    """The stages of a factorized convolution, with a batch norm and a PReLU after each but the last.

    Tucker-2 is a bottleneck without its nonlinearities (He et al. 2016, arXiv 1512.03385), CP the block of MobileNet
    (Howard et al. 2017, arXiv 1704.04861) and block terms that of ResNeXt (Xie et al. 2017, arXiv 1611.05431), as
    Kossaifi et al. 2020 (arXiv 1906.06196) and BT-Nets (Li et al. 2017, arXiv 1712.05689) observe. Here they begin as
    identities: norms undo their own normalisation, PReLUs have the slope 1. In evaluation the block computes what the
    factorized layer does; training opens it towards the architecture. Use it where a compressed network is to be
    trained for long, and linear stages in a row are no longer all that its parameters can do.

    Children are ``conv0``, ``norm0``, ``act0``, ``conv1`` and so on.

    Attributes:
        architecture: ``bottleneck``, ``mobilenet`` or ``resnext``.
    """

    architecture: str

    @classmethod
    def of(cls, layer: FactorizedLayer, *, norms: bool = True, activations: bool = True) -> Self:
        """Return the block of a factorized layer, which holds copies of its parameters.

        Args:
            layer: in the format ``tucker2``, ``cp3`` or ``block_term``.
            norms: whether there are batch norms.
            activations: whether there are PReLUs, with one slope for each channel.

        Raises:
            PlanError: a layer of another format, or of no stages between which something could be.

        Example:
            >>> from tenfold.decompositions import decompose
            >>> kernel = torch.randn(8, 6, 3, 3)
            >>> layer = FactorizedLayer.of(decompose(kernel, "tucker2", {"out": 4, "in": 3}).value)
            >>> [name for name, _ in ConvBlock.of(layer).named_children()]
            ['conv0', 'norm0', 'act0', 'conv1', 'norm1', 'act1', 'conv2']
        """
        known = {format: name for name, format in ARCHITECTURES.items()}
        if layer.format not in known or len(layer.stages) < 2:
            msg = (
                f"{layer.format} with {len(layer.stages)} stages is no block: {', '.join(known)} are, with two stages "
                "or more, of convolutions"
            )
            raise PlanError(msg)
        block = cls()
        block.architecture = known[layer.format]
        *first, last = _copies(layer)
        for at, stage in enumerate(first):
            conv: Any = stage
            like: Tensor = conv.weight
            block.add_module(f"conv{at}", stage)
            if norms:
                norm = _NORMS[layer.spec.axes](conv.out_channels, device=like.device, dtype=like.dtype)
                block.add_module(f"norm{at}", undone_(norm))
            if activations:
                slopes = nn.PReLU(conv.out_channels, init=1.0, device=like.device, dtype=like.dtype)
                block.add_module(f"act{at}", slopes)
        block.add_module(f"conv{len(first)}", last)
        return block.train(layer.training)

    @property
    def norms(self) -> tuple[nn.Module, ...]:
        """The batch norms, in order."""
        return tuple(module for name, module in self.named_children() if name.startswith("norm"))

    @property
    def opened(self) -> float:
        """How far training has opened it: the largest distance of a slope from 1; 0 is linear, 1 a ReLU."""
        slopes = [module.weight for module in self.children() if isinstance(module, nn.PReLU)]
        return max((float((1 - slope.detach()).abs().max()) for slope in slopes), default=0.0)


@torch.no_grad()
def undone_(norm: Any, mean: Tensor | None = None, variance: Tensor | None = None) -> Any:
    """Let a batch norm in evaluation be the identity, whatever its statistics; return it.

    With the mean and the variance of its inputs it is nearly that in training as well, up to how batches differ.
    """
    if mean is not None and variance is not None:
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
    norm.weight.copy_((norm.running_var + norm.eps).sqrt())
    norm.bias.copy_(norm.running_mean)
    return norm


def _copies(layer: FactorizedLayer) -> list[nn.Module]:
    """Return the stages of a layer of the same factors, with parameters of their own."""
    own = FactorizedLayer.of(layer.factorization(), layer.bias)
    return list(own.stages)
