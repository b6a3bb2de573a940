"""Small ONNX models of layers with made-up weights, to time: written directly, which takes milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from tenfold.errors import ExportError, require
from tenfold.records import LayerSpec, Shape, SubLayerSpec

INPUT, BEFORE, AFTER = "layer_input", "anchor_before", "anchor_after"
_NARROW = 4  # channels outside of the anchors
_OPSET, _IR = 18, 9
_SCALE = 0.05  # of made-up quantization


class ChainModel:
    """An ONNX model of layers one after the other, between two anchors that stand for their neighbours.

    The anchors are 1×1 convolutions around convolutions, which leave and take activations in the memory format that
    the runtime prefers, and softmaxes around others.

    Args:
        layers: plain layers of torch.
        in_shape: of the first one's input, batch included.
        int8: quantize weights and activations, with made-up ranges.

    Raises:
        ExportError: a layer is no plain layer of torch.
    """

    def __init__(self, layers: Sequence[SubLayerSpec], in_shape: Shape, *, int8: bool = False) -> None:
        self._onnx: Any = require("onnx", "export")
        self._nodes: list[Any] = []
        self._weights: list[Any] = []
        self._int8 = int8
        first = layers[0]
        self._axes = getattr(first, "axes", 0)
        looked_up = isinstance(first, LayerSpec) and first.kind == "embedding"
        self.in_shape = in_shape if looked_up or not self._axes else _with_channels(in_shape, self._axes, _NARROW)
        name = INPUT if looked_up else self._anchor(INPUT, BEFORE, in_shape, into=True)
        shape = in_shape
        for number, layer in enumerate(layers):
            if not isinstance(layer, LayerSpec):
                msg = f"only plain layers of torch are timed here, not {type(layer).__name__}"
                raise ExportError(msg)
            name = self._layer(f"layer{number}", layer, name, shape)
            shape = layer.out_shape(shape)
        self._anchor(name, AFTER, shape, into=False)
        self.is_integer = looked_up
        self._out_shape = shape

    def to_bytes(self) -> bytes:
        """Return the model as a file holds it."""
        helper, types = self._onnx.helper, self._onnx.TensorProto
        kind = types.INT64 if self.is_integer else types.FLOAT
        graph = helper.make_graph(
            self._nodes,
            "layers",
            [helper.make_tensor_value_info(INPUT, kind, self.in_shape)],
            [helper.make_tensor_value_info(AFTER, types.FLOAT, None)],
            self._weights,
        )
        opset = helper.make_opsetid("", _OPSET)
        return bytes(helper.make_model(graph, opset_imports=[opset], ir_version=_IR).SerializeToString())

    def example(self) -> Any:
        """Return an input: ones, or the indices of an embedding, spread out."""
        if not self.is_integer:
            return np.ones(self.in_shape, np.float32)
        rows = self._weights[0].dims[0]
        return (np.arange(prod(self.in_shape)) * 7919 % rows).reshape(self.in_shape)

    def _anchor(self, x: str, name: str, shape: Shape, *, into: bool) -> str:
        if not self._axes:
            return self._node("Softmax", [x], name)  # which no runtime merges with its neighbours
        channels = shape[-self._axes - 1]
        inner, outer = (_NARROW, channels) if into else (channels, _NARROW)
        narrow = LayerSpec(kind="conv", in_channels=inner, out_channels=outer, kernel=(1,) * self._axes)
        return self._layer(name, narrow, x, _with_channels(shape, self._axes, inner))

    def _layer(self, name: str, layer: LayerSpec, x: str, shape: Shape) -> str:
        weight = np.full(layer.weight_shape, 1 / max(1, prod(layer.weight_shape[1:])), np.float32)
        if layer.kind == "embedding":
            return self._node("Gather", [self._constant(f"{name}.weight", weight), x], name)
        if layer.kind == "linear":
            return self._linear(name, layer, x, shape, weight)
        if layer.padding_mode != "zeros":
            x = self._padded(name, layer, x)
        attributes = {
            "kernel_shape": layer.kernel,
            "strides": layer.stride,
            "dilations": layer.dilation,
            "group": layer.groups,
            "pads": _pads(layer) if layer.padding_mode == "zeros" else (0, 0) * layer.axes,
        }
        if layer.kind == "conv_transpose":
            attributes["output_padding"] = layer.output_padding
        return self._product("ConvTranspose" if layer.kind == "conv_transpose" else "Conv", name, x, weight, layer,
                             **attributes)  # fmt: skip

    def _linear(self, name: str, layer: LayerSpec, x: str, shape: Shape, weight: Any) -> str:
        if len(shape) == 2:
            return self._product("Gemm", name, x, weight, layer, transB=1)
        return self._product("MatMul", name, x, np.ascontiguousarray(weight.T), layer)

    def _product(self, operator: str, name: str, x: str, weight: Any, layer: LayerSpec, **attributes: Any) -> str:
        held = f"{name}.weight"
        inputs = [self._quantized(x), self._rounded(held, weight)] if self._int8 else [x, self._constant(held, weight)]
        if layer.bias and operator != "MatMul":
            inputs.append(self._constant(f"{name}.bias", np.zeros(layer.out_channels, np.float32)))
        out = self._node(operator, inputs, name, **attributes)
        if layer.bias and operator == "MatMul":
            added = self._constant(f"{name}.bias", np.zeros(layer.out_channels, np.float32))
            out = self._node("Add", [out, added], f"{name}.plus")
        return self._quantized(out) if self._int8 else out

    def _padded(self, name: str, layer: LayerSpec, x: str) -> str:
        modes = {"replicate": "edge", "circular": "wrap"}
        half = len(_pads(layer)) // 2
        pads = np.array([0, 0, *_pads(layer)[:half], 0, 0, *_pads(layer)[half:]], np.int64)
        mode = modes.get(layer.padding_mode, layer.padding_mode)
        return self._node("Pad", [x, self._constant(f"{name}.pads", pads)], f"{name}.padded", mode=mode)

    def _quantized(self, x: str) -> str:
        """Return the activation rounded to eight bits and back; once for each."""
        if x.endswith(".real"):
            return x
        scale = self._constant(f"{x}.scale", np.float32(_SCALE))
        zero = self._constant(f"{x}.zero", np.uint8(128))
        rounded = self._node("QuantizeLinear", [x, scale, zero], f"{x}.int8")
        return self._node("DequantizeLinear", [rounded, scale, zero], f"{x}.real")

    def _rounded(self, name: str, weight: Any) -> str:
        held = self._constant(name, np.full(weight.shape, 3, np.int8))
        scale = self._constant(f"{name}.scale", np.float32(_SCALE))
        zero = self._constant(f"{name}.zero", np.int8(0))
        return self._node("DequantizeLinear", [held, scale, zero], f"{name}.real")

    def _constant(self, name: str, value: Any) -> str:
        if all(held.name != name for held in self._weights):
            self._weights.append(self._onnx.numpy_helper.from_array(np.asarray(value), name))
        return name

    def _node(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self._nodes.append(self._onnx.helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output


def _pads(layer: LayerSpec) -> tuple[int, ...]:
    """Return what is padded at the beginning of each axis, then at the end of each."""
    if layer.padding == "valid":
        return (0, 0) * layer.axes
    if layer.padding == "same":
        reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel, strict=True)]
        return (*(r // 2 for r in reach), *(r - r // 2 for r in reach))
    return (*(int(p) for p in layer.padding), *(int(p) for p in layer.padding))


def _with_channels(shape: Shape, axes: int, channels: int) -> Shape:
    place = len(shape) - axes - 1
    return (*shape[:place], channels, *shape[place + 1 :])
