"""One tensor for the kernels of many convolutions, and the convolution that takes its kernel from there."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.errors import RankError, WeightError
from tenfold.records import LayerSpec, Shape

_RUN = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
Ranks = Mapping[str, int]


class KernelBank(nn.Module, abc.ABC):
    """The kernels of L convolutions of one shape as a tensor W (L, out, in, *kernel), factorized with shared factors.

    Kossaifi et al. 2019, *T-Net: parametrizing fully convolutional nets with a single high-order tensor* (arXiv
    1904.02698). Kernel l is U · core_l ×_in V: the factors U of the outputs and V of the inputs are shared by all, the
    small cores are mixes of few. ``TuckerBank`` and ``TrainBank`` say of which. All convolutions hold the same bank as
    a submodule, as tied layers do in torch: its parameters count, train and move once. Use
    ``tenfold.surgery.share_kernels`` for a trained network; one from scratch is built of ``SharedConv`` and one bank.

    Args:
        layers: L.
        out_channels: of every kernel.
        in_channels: of every kernel.
        kernel: sizes along one to three spatial axes.
        ranks: by name, ``layers``, ``out`` and ``in``; full where left out, and then without a factor.
        device: as in torch.
        dtype: as in torch.

    Raises:
        RankError: an unknown name, or a rank outside of what the tensor allows.
        WeightError: a size below 1, or more than three spatial axes.
    """

    rank_names: ClassVar[tuple[str, ...]] = ("layers", "out", "in")

    def __init__(
        self,
        layers: int,
        out_channels: int,
        in_channels: int,
        kernel: Sequence[int],
        ranks: Ranks | None = None,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.full_shape: Shape = (layers, out_channels, in_channels, *kernel)
        if min(self.full_shape) < 1 or len(kernel) not in _RUN:
            msg = (
                f"kernels {self.full_shape} have to be (layers, out, in, *kernel), ≥ 1, with one to three spatial axes"
            )
            raise WeightError(msg)
        self.ranks = self.check_ranks(self.full_shape, ranks or {})
        self._place: dict[str, Any] = {"device": device, "dtype": dtype}

    @classmethod
    @abc.abstractmethod
    def max_ranks(cls, shape: Shape, ranks: Ranks) -> dict[str, int]:
        """Return the largest useful ranks of a tensor of this shape, where some ranks are known already."""

    @classmethod
    @abc.abstractmethod
    def count(cls, shape: Shape, ranks: Ranks) -> int:
        """Return the number of parameters at these ranks."""

    @classmethod
    def check_ranks(cls, shape: Shape, ranks: Ranks) -> dict[str, int]:
        """Return all ranks by name, full where they are left out."""
        unknown = sorted(set(ranks) - set(cls.rank_names))
        if unknown:
            msg = f"a bank of kernels has the ranks {', '.join(cls.rank_names)}, not {', '.join(unknown)}"
            raise RankError(msg)
        most = cls.max_ranks(shape, ranks)
        for name, rank in ranks.items():
            if not 1 <= rank <= most[name]:
                msg = (
                    f"rank {name}={rank} is outside 1..{most[name]} for kernels {shape}: leave it out for the full one"
                )
                raise RankError(msg)
        return {name: ranks.get(name, most[name]) for name in cls.rank_names}

    @property
    @abc.abstractmethod
    def outer(self) -> Tensor | None:
        """The factor U (out, r_out) of the outputs, or None where their rank is full."""

    @property
    @abc.abstractmethod
    def inner(self) -> Tensor | None:
        """The factor V (in, r_in) of the inputs, or None where their rank is full."""

    @abc.abstractmethod
    def core(self, index: int) -> Tensor:
        """Return the core (r_out, r_in, *kernel) of one of the kernels."""

    @abc.abstractmethod
    def cores(self) -> Tensor:
        """Return the cores (L, r_out, r_in, *kernel) of all kernels."""

    @abc.abstractmethod
    def fill_(self, weights: Tensor) -> None:
        """Take the factors that are near to weights (L, out, in, *kernel), found by truncated SVDs alone."""

    @abc.abstractmethod
    def transform_(self, outputs: Tensor, inputs: Tensor) -> None:
        """Multiply outputs (out, out) and inputs (in, in) of all kernels with matrices, exactly."""

    def weights(self) -> Tensor:
        """Return all kernels (L, out, in, *kernel), multiplied out."""
        found = self.cores()
        if self.outer is not None:
            found = torch.einsum("or,lr...->lo...", self.outer, found)
        return found if self.inner is None else torch.einsum("ir,lor...->loi...", self.inner, found)

    @property
    @abc.abstractmethod
    def mixing(self) -> int:
        """Multiply-accumulates that make one core of the shared factors, in every forward."""

    def macs(self, positions_in: int, positions_out: int) -> int:
        """Return the multiply-accumulates of one convolution, with so many places before and after it."""
        _, out, inner, *kernel = self.full_shape
        first = 0 if self.inner is None else inner * self.ranks["in"] * positions_in
        last = 0 if self.outer is None else out * self.ranks["out"] * positions_out
        return self.mixing + first + self.ranks["out"] * self.ranks["in"] * prod(kernel) * positions_out + last

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the factors for training from scratch: kernels with the variance 2/(in·K) of He et al. 2015."""
        for parameter in self.parameters():
            nn.init.normal_(parameter)
        _, _, inner, *kernel = self.full_shape
        power = float(self.weights().double().square().mean())
        share = (2 / (inner * prod(kernel)) / max(power, 1e-300)) ** (0.5 / sum(1 for _ in self.parameters()))
        for parameter in self.parameters():
            parameter.mul_(share)

    def extra_repr(self) -> str:
        """Return shape and ranks."""
        return f"{self.full_shape}, " + ", ".join(f"{name}={rank}" for name, rank in self.ranks.items())


class SharedConv(nn.Module):
    """A convolution whose kernel is one of a bank: 1×1 by the shared V, k×k by its own core, 1×1 by the shared U.

    Args:
        bank: of all kernels.
        index: which of them this is, from 0.
        spec: the geometry of the convolution: stride, padding, dilation; without groups, padded with zeros.
        bias: (out,), or None; it is the layer's own.

    Raises:
        WeightError: a geometry that the bank cannot serve.
    """

    def __init__(self, bank: KernelBank, index: int, spec: LayerSpec, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        reason = unshared(spec)
        if reason or spec.weight_shape != bank.full_shape[1:] or not 0 <= index < bank.full_shape[0]:
            reason = reason or f"kernel {index} of {spec.weight_shape} is none of the bank's {bank.full_shape}"
            raise WeightError(reason)
        self.bank, self.index, self.spec = bank, index, spec
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        """The dense kernel (out, in, *kernel), multiplied out on every access."""
        found = self.bank.core(self.index)
        if self.bank.outer is not None:
            found = torch.einsum("or,r...->o...", self.bank.outer, found)
        return found if self.bank.inner is None else torch.einsum("ir,or...->oi...", self.bank.inner, found)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        """Return what the convolution with the dense kernel returns."""
        bank, spec, run = self.bank, self.spec, _RUN[self.spec.axes]
        x, ones = input, (1,) * spec.axes
        if bank.inner is not None:
            x = run(x, bank.inner.t().reshape(-1, len(bank.inner), *ones))
        own = self.bias if bank.outer is None else None
        x = run(x, bank.core(self.index), own, spec.stride, spec.padding, spec.dilation)
        if bank.outer is not None:
            x = run(x, bank.outer.reshape(*bank.outer.shape, *ones), self.bias)
        return x

    def extra_repr(self) -> str:
        """Return the place in the bank, and the dense convolution."""
        return f"{self.index} of {self.bank.full_shape[0]}, for {self.spec}"


def unshared(spec: LayerSpec | None) -> str:
    """Return why a layer cannot take its kernel from a bank, or an empty text."""
    if spec is None or spec.kind != "conv":
        return "kernels of convolutions are shared, and of no other layers"
    if spec.groups > 1:
        return "a grouped convolution has kernels of its own kind: it is not shared"
    if spec.padding_mode != "zeros":
        return f"a convolution that pads by {spec.padding_mode!r} is not shared: zeros are"
    return ""
