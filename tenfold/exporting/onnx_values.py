"""What flows through an ONNX graph on given inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from tenfold.errors import require
from tenfold.runtimes.onnx_module import feeds, open_session, session_options
from tenfold.tracing.inputs import batch_size_of

_ELEMENTS = 2**26  # of the values held at a time, about


def values_in(model: Any, names: Sequence[str], inputs: list[Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of the tensors ``names`` of a graph, for every batch.

    Tensors are computed some at a time: of large networks not all would fit into memory.

    Args:
        model: an ``onnx.ModelProto``, left unchanged.
        names: of outputs of nodes, or of inputs of the graph.
        inputs: batches, as the model takes them.
    """
    onnx: Any = require("onnx", "export")
    require("onnxruntime", "export")
    weights = {tensor.name for tensor in model.graph.initializer}
    given = [value.name for value in model.graph.input if value.name not in weights]
    for group in _groups(model, [name for name in names if name not in given], inputs):
        watched = onnx.ModelProto()
        watched.CopyFrom(model)
        del watched.graph.output[:]
        watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in group)
        options = session_options(torch.get_num_threads())
        session = open_session(watched.SerializeToString(), options)
        for batch in inputs:
            for name, value in zip(group, session.run(group, feeds(given, batch)), strict=True):
                yield name, torch.from_numpy(value)
    for batch in inputs:
        fed = feeds(given, batch)
        yield from ((name, torch.from_numpy(fed[name])) for name in names if name in fed)


def _groups(model: Any, names: list[str], inputs: list[Any]) -> Iterator[list[str]]:
    """Yield the names in groups that fit into memory together."""
    samples = max(batch_size_of(batch) or 1 for batch in inputs)
    onnx: Any = require("onnx", "export")
    shapes = {v.name: v.type.tensor_type.shape.dim for v in onnx.shape_inference.infer_shapes(model).graph.value_info}
    size, group = 0, list[str]()
    for name in names:
        elements = prod(dim.dim_value or samples for dim in shapes.get(name, ()))  # open: the batch
        if group and size + elements > _ELEMENTS:
            yield group
            size, group = 0, []
        size, group = size + elements, [*group, name]
    if group:
        yield group
