"""Six convolutions, dense or with kernels that are tensor trains from the start (Garipov et al. 2016, section 6)."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.formats.tt_conv import TTConv
from tenfold.layers import TTLinear
from tenfold.records import LayerSpec
from tenfold.tensors.trains import fit_ranks, tt_randn, tt_to_dense

WIDTHS = (64, 64, 128, 128, 128, 128)
KERNEL = (3, 3)


class TrainConv(nn.Module):
    """A convolution without bias whose kernel is multiplied out of the cores of a train in every forward.

    ``tt_conv`` pairs modes of the channels, as the source does; ``naive`` is the train of the kernel as it is,
    (3, 3, in, out). Entries begin with He's variance.

    Args:
        inputs: channels.
        outputs: channels.
        format: ``tt_conv`` or ``naive``.
        rank: of all bonds, where they can use it.
        padding: pixels of zeros.
    """

    def __init__(self, inputs: int, outputs: int, format: str, rank: int, padding: int) -> None:
        super().__init__()
        self.spec = LayerSpec(kind="conv", in_channels=inputs, out_channels=outputs, kernel=KERNEL, bias=False)
        self.format, self.padding = format, padding
        std = (2 / (prod(KERNEL) * inputs)) ** 0.5
        cores = tt_randn(modes(format, self.spec), fit_ranks(modes(format, self.spec), rank), std)
        self.cores = nn.ParameterList(nn.Parameter(core) for core in cores)

    @property
    def weight(self) -> Tensor:
        """The kernel (out, in, 3, 3)."""
        dense = tt_to_dense(tuple(self.cores))
        if self.format == "naive":
            return dense.permute(3, 2, 0, 1)
        return TTConv.from_tensor(dense[None], self.spec)[0]

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution; the kernel is made in float32 whatever it is used in."""
        with torch.autocast(x.device.type, enabled=False):
            weight = self.weight
        return F.conv2d(x, weight.contiguous(memory_format=torch.channels_last), padding=self.padding)


def modes(format: str, spec: LayerSpec) -> tuple[int, ...]:
    """Return the modes of the train that a kernel is."""
    return TTConv.modes(spec) if format == "tt_conv" else (*KERNEL, spec.in_channels, spec.out_channels)


def largest_rank(format: str, inputs: int, outputs: int, params: float) -> int:
    """Return the largest rank at which the train of a kernel has at most so many parameters, at least 1."""
    sides = modes(format, LayerSpec(kind="conv", in_channels=inputs, out_channels=outputs, kernel=KERNEL, bias=False))

    def count(rank: int) -> int:
        bonds = (1, *fit_ranks(sides, rank), 1)
        return sum(left * n * right for left, n, right in zip(bonds[:-1], sides, bonds[1:], strict=True))

    return max((r for r in range(1, max(inputs, outputs) * prod(KERNEL)) if count(r) <= params), default=1)


class Net(nn.Module):
    """3→64→64, pool, →128→128, pool, →128→128 without borders, then a mean or hidden layers; norms and ReLU between.

    Args:
        format: of all kernels but the first; dense where left out.
        times: how many times fewer parameters the whole network is to have by that.
        hidden: widths of fully connected layers in the place of the mean over the last 4x4 pixels.
        fc_rank: of these as trains; dense where left out.
    """

    def __init__(
        self, format: str | None = None, times: float = 1.0, hidden: tuple[int, ...] = (), fc_rank: int | None = None
    ) -> None:
        super().__init__()
        pairs = list(zip((3, *WIDTHS), WIDTHS, strict=False))
        kernels = [prod(KERNEL) * i * o for i, o in pairs]
        others = kernels[0] + 2 * sum(WIDTHS) + 10 * WIDTHS[-1]  # the first kernel, norms, the last layer
        share = ((others + sum(kernels[1:])) / times - others) / sum(kernels[1:])
        layers: list[nn.Module] = []
        for k, (inputs, outputs) in enumerate(pairs):
            padding = 0 if k >= 4 else 1
            if k == 0 or format is None:
                conv: nn.Module = nn.Conv2d(inputs, outputs, KERNEL, padding=padding, bias=False)
            else:
                rank = largest_rank(format, inputs, outputs, share * kernels[k])
                conv = TrainConv(inputs, outputs, format, rank, padding)
            layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
            if k in (1, 3):
                layers.append(nn.MaxPool2d(3, 2, padding=1))
        self.features = nn.Sequential(*layers)
        self.pool = nn.Flatten() if hidden else nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        width, head = WIDTHS[-1] * (16 if hidden else 1), list[nn.Module]()
        for out in hidden:
            head += [_linear(width, out, fc_rank), nn.BatchNorm1d(out), nn.ReLU(inplace=True)]
            width = out
        self.head = nn.Sequential(*head, nn.Linear(width, 10, bias=bool(hidden)))

    def forward(self, pictures: Tensor) -> Tensor:
        """Return the class scores (samples, 10) of pictures (samples, 3, 32, 32)."""
        scores: Tensor = self.head(self.pool(self.features(pictures)))
        return scores


def _linear(inputs: int, outputs: int, rank: int | None) -> nn.Module:
    return nn.Linear(inputs, outputs, bias=False) if rank is None else TTLinear(inputs, outputs, rank, bias=False)


def build(variant: dict[str, Any], seed: int) -> nn.Module:
    """Return a fresh network, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net(**variant).eval()
