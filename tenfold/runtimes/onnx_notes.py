"""What exporters write into ONNX files besides the network: traces of their own work, shapes of every value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_NOTES = ("doc_string", "metadata_props", "value_info")


def write_bare(model: Any, file: Path) -> None:
    """Write an ``onnx.ModelProto`` without the notes on its nodes, values, graphs and functions; it loses them itself.

    No runtime reads them. Torch's exporter leaves the Python stack of every node, a third of a file in eight-bit
    integers, and the shapes of all values, weights included: a tool that replaces a weight by another, as
    ``quantize_dynamic`` of ONNX Runtime does, is then refused by shape inference. The types of inputs and outputs stay,
    and so do the properties of the model itself, which belong to users.

    Example:
        >>> import tempfile, onnx
        >>> from onnx import helper
        >>> x, y = (helper.make_tensor_value_info(name, 1, [2], doc_string="traced") for name in "xy")
        >>> node = helper.make_node("Abs", ["x"], ["y"], doc_string="line 7")
        >>> file = Path(tempfile.mkdtemp()) / "abs.onnx"
        >>> write_bare(helper.make_model(helper.make_graph([node], "g", [x], [y])), file)
        >>> graph = onnx.load(file).graph
        >>> graph.node[0].doc_string, graph.input[0].doc_string, graph.input[0].type == x.type
        ('', '', True)
    """
    for part in (model.graph, *model.functions):
        _clear(part)
    file.write_bytes(model.SerializeToString())


def _clear(message: Any) -> None:
    """Clear the notes of a message and of all messages in it, graphs of branches and loops among them."""
    for name in _NOTES:
        if name in message.DESCRIPTOR.fields_by_name:
            message.ClearField(name)
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for part in [value] if hasattr(value, "DESCRIPTOR") else value:
                _clear(part)
