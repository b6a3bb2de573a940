"""Convolutions of one bit a weight, with factors behind the bits in training and packed bits after it."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.errors import WeightError
from tenfold.networks.multi_domain import DomainConvStack

LatentKind = Literal["independent", "matrix", "tucker"]
_WINDOW = 0.5  # root mean square of latent weights before the sign, whose gradient is cut off at ±1


def sign(x: Tensor) -> Tensor:
    """Return ±1 (0 becomes 1), whose gradient is that of x where |x| ≤ 1, and 0 beyond: the straight-through estimator.

    Example:
        >>> x = torch.tensor([-2.0, -0.5, 0.0, 3.0], requires_grad=True)
        >>> sign(x).sum().backward()
        >>> sign(x).tolist(), x.grad.tolist()
        ([-1.0, -1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0])
    """
    bits = torch.where(x >= 0, torch.ones_like(x), -torch.ones_like(x))
    if not (torch.is_grad_enabled() and x.requires_grad):
        return bits
    inside = x.clamp(-1, 1)
    return inside + (bits - inside).detach()


class Latent(nn.Module):
    """The real tensor behind the bits of a convolution: independent numbers, or a product that couples them.

    Use it by name in ``BinaryConv2d``.

    Args:
        shape: (out, in, k, k).
        kind: ``independent``; ``matrix``, U·V of (out, rank) and (rank, in·k²); ``tucker``, a core with a factor for
            out, in and kernel.
        place: ``device`` and ``dtype`` as in torch.
    """

    def __init__(self, shape: tuple[int, int, int, int], kind: LatentKind, **place: Any) -> None:
        super().__init__()
        if kind not in {"independent", "matrix", "tucker"}:
            msg = f"latent={kind!r} is independent, matrix or tucker, or a module that returns the latent weights"
            raise WeightError(msg)
        self.shape = shape
        out, inputs, k, _ = shape
        sides = {"independent": (), "matrix": (out,), "tucker": (out, inputs, k * k)}[kind]
        self.core = nn.Parameter(torch.empty(out, inputs, k * k, **place))
        nn.init.normal_(self.core, std=_WINDOW)
        self.factors = nn.ParameterList(torch.eye(n, **place) for n in sides)

    def forward(self) -> Tensor:
        """Return the latent weights (out, in, k, k); at the start they are the core's, whatever the kind."""
        found: Tensor = self.core
        for axis, factor in enumerate(self.factors):
            found = torch.tensordot(factor, found, ([1], [axis])).movedim(0, axis)
        return found.view(self.shape)


class NetworkLatent(nn.Module):
    """The part of one layer in a Tucker tensor over all equally shaped layers of a network.

    Use it as the ``latent`` of binary convolutions whose bits are to depend on each other.

    Args:
        stack: shared by the layers, with a domain ``bits``.
        layer: which it is.
    """

    def __init__(self, stack: DomainConvStack, layer: int) -> None:
        super().__init__()
        self.stack, self.layer = stack, layer

    def forward(self) -> Tensor:
        """Return the latent weights (out, in, k, k)."""
        return self.stack.weights("bits")[self.layer]


class BinaryConv2d(nn.Module):
    """A convolution of signs of inputs with signs of latent weights, times a learned scale for each channel.

    y = α ∘ (sign(W) * sign(x)); gradients pass through signs where the argument is within ±1 (straight through). With
    ``matrix`` or ``tucker`` W is a product of real factors, of full rank, which couples the bits of a layer; so does a
    ``NetworkLatent`` for all layers (Bulat et al. 2019, arXiv 1904.07852). Use it with ``pack`` where a file of one bit
    a weight counts; torch computes with ±1 in floating point and is no faster for it. Train without weight
    decay: only the signs of latent weights matter, which are scaled to a common size first.

    Args:
        in_channels: as in torch.
        out_channels: as in torch.
        kernel_size: odd; the picture keeps its size.
        latent: ``independent``, ``matrix``, ``tucker``, or a module that returns (out, in, k, k).
        binary_inputs: whether inputs are replaced by their signs.
        place: ``device`` and ``dtype`` as in torch.

    Raises:
        WeightError: an even kernel, or an unknown kind.

    Example:
        >>> BinaryConv2d(8, 16, 3, latent="tucker")(torch.randn(2, 8, 5, 5)).shape
        torch.Size([2, 16, 5, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        latent: LatentKind | nn.Module = "independent",
        binary_inputs: bool = True,
        **place: Any,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            msg = f"kernel_size={kernel_size} is odd, so that pictures keep their size"
            raise WeightError(msg)
        self.shape = (out_channels, in_channels, kernel_size, kernel_size)
        self.binary_inputs = binary_inputs
        self.latent = latent if isinstance(latent, nn.Module) else Latent(self.shape, latent, **place)
        size = (in_channels * kernel_size**2) ** -0.5  # at which outputs have unit variance
        self.scale = nn.Parameter(torch.full((out_channels,), size, **place))

    def bits(self) -> Tensor:
        """Return the weights (out, in, k, k), ±1, through which gradients reach the latent ones."""
        latent = self.latent()
        rms = latent.detach().square().mean().sqrt() + torch.finfo(latent.dtype).tiny
        return sign(latent * (_WINDOW / rms))

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, out, rows, columns) of (batch, in, rows, columns)."""
        return _convolved(x, self.bits(), self.scale, binary_inputs=self.binary_inputs)


class PackedConv2d(nn.Module):
    """A binary convolution as it is stored: eight weights in a byte, and a scale for each channel.

    It computes what the ``BinaryConv2d`` that it was made from does, to the last bit, and has no latent weights. Bits
    are unpacked in each forward. Use ``pack`` to make it.

    Args:
        shape: (out, in, k, k).
        binary_inputs: as in ``BinaryConv2d``.
        place: ``device`` and ``dtype`` of the scale.
    """

    packed: Tensor

    def __init__(self, shape: tuple[int, int, int, int], *, binary_inputs: bool = True, **place: Any) -> None:
        super().__init__()
        self.shape, self.binary_inputs = shape, binary_inputs
        count = -(-torch.Size(shape).numel() // 8)
        self.register_buffer("packed", torch.zeros(count, dtype=torch.uint8, device=place.get("device")))
        self.scale = nn.Parameter(torch.ones(shape[0], **place))

    @classmethod
    @torch.no_grad()
    def of(cls, layer: BinaryConv2d) -> PackedConv2d:
        """Return what stores the bits of a layer."""
        like = layer.scale
        made = cls(layer.shape, binary_inputs=layer.binary_inputs, device=like.device, dtype=like.dtype)
        flat = (layer.bits() > 0).flatten().to(torch.uint8)
        eights = F.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
        made.packed.copy_((eights << torch.arange(8, device=like.device)).sum(1))
        made.scale.copy_(like)
        return made.train(layer.training)

    def bits(self) -> Tensor:
        """Return the weights (out, in, k, k), ±1 in the dtype of the scale."""
        halves = 0.5 ** torch.arange(8.0, device=self.packed.device)  # shifts by arithmetic, which exporters know
        flat = ((self.packed[:, None].float() * halves).floor() % 2).flatten()[: torch.Size(self.shape).numel()]
        return (2 * flat - 1).to(self.scale.dtype).view(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, out, rows, columns) of (batch, in, rows, columns)."""
        return _convolved(x, self.bits(), self.scale, binary_inputs=self.binary_inputs)


def pack(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose binary convolutions store bits: one for each weight, and nothing latent.

    Use it after training, and on a freshly built model to have a skeleton that loads the packed state dict.

    Example:
        >>> net = nn.Sequential(BinaryConv2d(16, 32, 3, latent="matrix"))
        >>> small = pack(net)
        >>> {key: tuple(value.shape) for key, value in small.state_dict().items()}
        {'0.scale': (32,), '0.packed': (576,)}
    """
    made = deepcopy(model)
    return _replaced(made, PackedConv2d.of)


def _replaced(module: nn.Module, make: Callable[[BinaryConv2d], nn.Module]) -> nn.Module:
    if isinstance(module, BinaryConv2d):
        return make(module)
    for name, child in list(module.named_children()):
        setattr(module, name, _replaced(child, make))
    return module


def _convolved(x: Tensor, bits: Tensor, scale: Tensor, *, binary_inputs: bool) -> Tensor:
    seen = sign(x) if binary_inputs else x
    return F.conv2d(seen, bits, padding=bits.shape[-1] // 2) * scale[:, None, None]


class BinaryNet(nn.Module):
    """A small residual network whose inner convolutions are binary; the first and the last layer are real.

    Use it to compare latents: ``network`` is one Tucker tensor over all inner layers.

    Args:
        channels: of all layers.
        layers: binary convolutions; the picture is halved after the first two.
        latent: ``independent``, ``matrix``, ``tucker`` or ``network``.
        inputs: channels of the pictures.
        classes: of the head.

    Example:
        >>> BinaryNet(8, 4, "network")(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        channels: int = 32,
        layers: int = 6,
        latent: LatentKind | Literal["network"] = "independent",
        *,
        inputs: int = 3,
        classes: int = 10,
    ) -> None:
        super().__init__()
        latents: list[Any] = [latent] * layers
        if latent == "network":
            stack = DomainConvStack(channels, 3, layers)
            stack.add("bits")
            latents = [NetworkLatent(stack, k) for k in range(layers)]
        self.stem = nn.Conv2d(inputs, channels, 3, stride=2, padding=1, bias=False)
        self.convs = nn.ModuleList(BinaryConv2d(channels, channels, 3, latent=own) for own in latents)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(layers + 1))
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores (batch, classes) of pictures (batch, inputs, rows, columns)."""
        x = self.norms[0](self.stem(x))
        for k, conv in enumerate(self.convs):
            x = F.hardtanh(x + self.norms[k + 1](conv(x)))
            x = F.avg_pool2d(x, 2) if k == 1 else x
        scores: Tensor = self.head(x.mean((2, 3)))
        return scores
