"""Round the weights of quantized convolutions so that the errors of a filter make up for each other."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold.errors import require
from tenfold.exporting.onnx_rescale import group_of
from tenfold.exporting.onnx_values import values_in

_PATCHES = 2**15  # of the inputs of a convolution, from which its moments are taken
_DAMPING = 0.01  # of the mean of the diagonal, as in the paper
_LARGEST = 127


def round_weights_(quantized: Any, model: Any, inputs: list[Any]) -> int:
    """Replace the integers of convolutions by those that change their outputs least; return of how many.

    The nearest integers make the least error of each weight. What counts is that of the output: with H, the second
    moments of the patches that a filter w sees, it is (q − w)ᵀ H (q − w), made small by rounding one weight after the
    other and passing the error on to those that are left (Frantar et al. 2022, GPTQ, arXiv 2210.17323). Scales stay.
    Convolutions over other than two axes keep the nearest integers.

    Args:
        quantized: an ``onnx.ModelProto`` in QDQ form, whose integers are changed.
        model: what it was quantized from; nodes have the same names.
        inputs: calibration batches.
    """
    helper: Any = require("onnx.numpy_helper", "export")
    integers = {tensor.name: tensor for tensor in quantized.graph.initializer}
    floats = {tensor.name: tensor for tensor in model.graph.initializer}
    sources = {node.output[0]: node for node in quantized.graph.node if node.op_type == "DequantizeLinear"}
    places = {
        node.name: sources[node.input[1]].input
        for node in quantized.graph.node
        if node.op_type == "Conv" and node.input[1] in sources and sources[node.input[1]].input[0] in integers
    }
    nodes = [node for node in model.graph.node if node.name in places and _is_plain(node, floats)]
    moments = _moments(model, nodes, floats, inputs)
    for node in nodes:
        place, scales = places[node.name][:2]
        weight = torch.from_numpy(helper.to_array(floats[node.input[1]]).copy()).double()
        scale = torch.from_numpy(helper.to_array(integers[scales]).copy()).double().reshape(-1, 1)
        groups = group_of(node)
        rows, scale = weight.reshape(groups, -1, weight[0].numel()), scale.expand(len(weight), 1).reshape(groups, -1, 1)
        made = rounded(rows, scale, moments[node.name]).reshape(weight.shape)
        integers[place].CopyFrom(helper.from_array(made.to(torch.int8).numpy(), place))
    return len(nodes)


def rounded(weight: Tensor, scale: Tensor, moments: Tensor) -> Tensor:
    """Return integers q with a small error (q·scale − weight) in the norm of the second moments.

    Args:
        weight: groups × filters × inputs.
        scale: groups × filters × 1.
        moments: of the inputs, groups × inputs × inputs.

    Example:
        >>> weight, scale = torch.tensor([[[0.4, 0.4]]]).double(), torch.ones(1, 1, 1).double()
        >>> alike = torch.ones(1, 2, 2).double()  # both inputs are always the same: 0.8 is nearer to 1 than to 0
        >>> rounded(weight, scale, alike).tolist(), rounded(weight, scale, torch.eye(2)[None].double()).tolist()
        ([[[0.0, 1.0]]], [[[0.0, 0.0]]])
    """
    size = weight.shape[-1]
    diagonal = moments.diagonal(dim1=1, dim2=2)
    order = diagonal.argsort(dim=1, descending=True, stable=True)  # errors of the largest have all others to go to
    damping = _DAMPING * diagonal.mean(1).clamp_min(torch.finfo(torch.float32).tiny)
    damped = moments + damping[:, None, None] * torch.eye(size, dtype=moments.dtype)
    damped = torch.stack([one[at][:, at] for one, at in zip(damped, order, strict=True)])
    left = weight.gather(2, order[:, None].expand_as(weight)).clone()
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    made = torch.zeros_like(left)
    for i in range(size):
        made[..., i] = (left[..., i] / scale[..., 0]).round().clamp(-_LARGEST, _LARGEST)
        error = (left[..., i] - made[..., i] * scale[..., 0]) / factor[:, None, i, i]
        left[..., i + 1 :] -= error[..., None] * factor[:, None, i, i + 1 :]
    return torch.zeros_like(made).scatter(2, order[:, None].expand_as(made), made)


def _is_plain(node: Any, floats: dict[str, Any]) -> bool:
    """Whether a convolution is over two axes, with its padding in numbers."""
    pads = {a.name: a for a in node.attribute}.get("auto_pad")
    return node.input[1] in floats and len(floats[node.input[1]].dims) == 4 and (pads is None or pads.s == b"NOTSET")


def _moments(model: Any, nodes: list[Any], floats: dict[str, Any], inputs: list[Any]) -> dict[str, Tensor]:
    """Return the second moments of what the filters of each convolution see, groups × inputs × inputs, by its name."""
    readers: dict[str, list[Any]] = {}
    for node in nodes:
        readers.setdefault(node.input[0], []).append(node)
    found: dict[str, Tensor] = {}
    for name, value in values_in(model, list(readers), inputs):
        for node in readers[name]:
            kernel = tuple(floats[node.input[1]].dims[2:])
            patches = _patches(value.float(), node, kernel, -(-_PATCHES // len(inputs)))
            own = patches.reshape(group_of(node), -1, patches.shape[1]).double()
            found[node.name] = found.get(node.name, torch.zeros(())) + own @ own.mT / own.shape[2]
    return found


def _patches(value: Tensor, node: Any, kernel: tuple[int, ...], most: int) -> Tensor:
    """Return at most about ``most`` of the patches that a convolution multiplies; inputs of a filter × patches."""
    given = {a.name: list(a.ints) for a in node.attribute if a.ints}
    top, left, bottom, right = given.get("pads", [0, 0, 0, 0])
    stride, dilation = (tuple(given.get(name, [1, 1])) for name in ("strides", "dilations"))
    places = max(1, value.shape[2] * value.shape[3] // (stride[0] * stride[1]))
    some = value[:: max(1, len(value) * places // max(most, places))]
    padded = F.pad(some, (left, right, top, bottom))
    patches = F.unfold(padded, kernel, dilation=dilation, stride=stride).transpose(0, 1).flatten(1)
    return patches[:, :: max(1, patches.shape[1] // most)]
