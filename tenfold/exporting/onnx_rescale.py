"""Rescale the channels between convolutions of an ONNX graph before it is quantized: free, and exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tenfold.errors import require
from tenfold.exporting.onnx_values import values_in

_BINS = 512
_LEVELS = 255
_LEAST = 1e-4  # of the largest range: channels that are all but silent are not blown up without bound


def rescale_(model: Any, inputs: list[Any]) -> dict[str, tuple[float, float]]:
    """Give the channels between two convolutions the same range, and return the range of each such tensor.

    A tensor has one scale in eight bits, and its channels may differ in range by orders of magnitude: those of a CP
    layer, 1×1, depthwise and 1×1, are as large as the fit of the factors left them. Where nothing stands between two
    convolutions, channel r is multiplied by c_r in the first and divided by it in the second: the network is the same,
    and each channel uses all levels (Nagel et al. 2019, arXiv 1906.04721, who equalize ranges of weights; here those of
    activations). The range of a channel is that with the least squared error, of rounding within it and of clipping
    beyond (Banner et al. 2019, arXiv 1810.05723, with the histogram in place of a distribution).

    Args:
        model: an ``onnx.ModelProto``, whose weights are changed.
        inputs: calibration batches.
    """
    pairs = _pairs(model)
    ends = {name: torch.zeros(0, 2) for name in pairs}  # least and largest value of each channel
    for name, value in values_in(model, list(pairs), inputs):
        channels = _by_channel(value)
        found = torch.stack([channels.amin(1), channels.amax(1)], 1)
        old = ends[name] if len(ends[name]) else found
        ends[name] = torch.stack([torch.minimum(old, found)[:, 0], torch.maximum(old, found)[:, 1]], 1)
    counts = {name: torch.zeros(len(end), _BINS) for name, end in ends.items()}
    for name, value in values_in(model, list(pairs), inputs):
        counts[name] += _histogram(_by_channel(value), ends[name].abs().amax(1))
    ranges = {}
    for name, (first, second) in pairs.items():
        largest = ends[name].abs().amax(1)
        share = best_shares(counts[name])
        limit = (largest * share).clamp_min(float(largest.max()) * _LEAST)
        if not float(limit.max()):
            continue
        scale = limit.max() / limit
        low, high = ((ends[name] * scale[:, None])[:, side] for side in (0, 1))
        bound = float(limit.max())
        ranges[name] = (max(float(low.min()), -bound), min(float(high.max()), bound))
        first.multiply(scale.numpy())
        second.divide(scale.numpy())
    return ranges


def best_shares(counts: Tensor) -> Tensor:
    """Return for each channel which share of its largest absolute value to take as range.

    Args:
        counts: how often |x| falls into each of equal bins between 0 and the largest one; channels × bins.

    Example:
        >>> flat, spiked = torch.ones(100), torch.zeros(100)
        >>> spiked[10], spiked[-1] = 1e9, 1
        >>> best_shares(torch.stack([flat, spiked])).tolist()[0], float(best_shares(spiked[None])) < 0.2
        (1.0, True)
    """
    bins = counts.shape[1]
    middle = (torch.arange(bins) + 0.5) / bins
    shares = torch.linspace(0.1, 1, 91)
    beyond = (middle[None, :] - shares[:, None]).clamp_min(0).square()  # shares × bins
    clipped = counts.double() @ beyond.double().T / counts.double().sum(1, keepdim=True).clamp_min(1)
    rounded = (2 * shares.double() / _LEVELS).square() / 12
    return shares[(clipped + rounded).argmin(1)]


@dataclass(frozen=True)
class _Conv:
    """A convolution with its weights, to be rescaled by channels."""

    node: Any
    weights: dict[str, Any]

    def multiply(self, scale: Any) -> None:
        """Multiply the output channels."""
        for name in self.node.input[1:]:
            self._change(name, lambda old: old * scale.reshape(-1, *[1] * (old.ndim - 1)))

    def divide(self, scale: Any) -> None:
        """Divide the input channels, which the groups of the convolution share out."""
        groups = group_of(self.node)

        def divided(old: Any) -> Any:
            own = old.reshape(groups, -1, *old.shape[1:])
            by = scale.reshape(groups, 1, old.shape[1], *[1] * (old.ndim - 2))
            return (own / by).reshape(old.shape)

        self._change(self.node.input[1], divided)

    def _change(self, name: str, made: Any) -> None:
        helper: Any = require("onnx.numpy_helper", "export")
        old = helper.to_array(self.weights[name])
        self.weights[name].CopyFrom(helper.from_array(made(old).astype(old.dtype), name))


def group_of(node: Any) -> int:
    """Return the groups of a convolution."""
    return next((int(a.i) for a in node.attribute if a.name == "group"), 1)


def _pairs(model: Any) -> dict[str, tuple[_Conv, _Conv]]:
    """Return the convolutions before and after each tensor that only passes from one to the other."""
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    shown = {value.name for value in graph.output}

    def own(node: Any) -> bool:  # weights that nobody else reads
        return node.op_type == "Conv" and all(n in weights and len(readers[n]) == 1 for n in node.input[1:])

    found = {}
    for node in graph.node:
        name = node.output[0] if node.output else ""
        after = readers.get(name, [])
        if name not in shown and own(node) and len(after) == 1 and own(after[0]) and after[0].input[0] == name:
            found[name] = (_Conv(node, weights), _Conv(after[0], weights))
    return found


def _by_channel(value: Tensor) -> Tensor:
    return value.float().transpose(0, 1).flatten(1)


def _histogram(channels: Tensor, largest: Tensor) -> Tensor:
    """Count |x| of each channel in equal bins up to its largest value."""
    bins = (channels.abs() * (_BINS / largest.clamp_min(torch.finfo(torch.float32).tiny))[:, None]).long()
    flat = bins.clamp_(max=_BINS - 1) + torch.arange(len(channels))[:, None] * _BINS
    return torch.bincount(flat.flatten(), minlength=len(channels) * _BINS).reshape(len(channels), _BINS).float()
