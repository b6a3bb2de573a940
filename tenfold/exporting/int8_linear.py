"""Eight-bit integers for linear layers in torch, factors included, by torchao."""

from __future__ import annotations

from typing import Any

from torch import nn

from tenfold.errors import ExportError, require
from tenfold.runtimes.quiet import quiet
from tenfold.tracing import copied


def int8_linear(model: nn.Module, *, activations: bool = True) -> nn.Module:
    """Return a copy of a model whose linear layers hold eight-bit integers, factors included.

    For inference, after compression and recovery. Weights are rounded with a scale for each output, symmetric;
    activations, if quantized, dynamically per token. Under ``torch.compile`` products are computed in integers. The
    new weights are tensors of torchao, which nothing else reads: keep the checkpoint in floating point, and call this
    after ``load``.

    Args:
        model: in evaluation mode, on its device; left unchanged.
        activations: quantize the inputs of the layers too; weights alone save memory, but no time on most CPUs.

    Raises:
        ExportError: the model has no linear layer.
        MissingExtraError: torchao is not installed.

    Example:
        >>> import torch
        >>> slim = int8_linear(nn.Sequential(nn.Linear(64, 32), nn.ReLU()).eval(), activations=False)
        >>> slim(torch.ones(1, 64)).shape
        torch.Size([1, 32])
    """
    with quiet():
        torchao: Any = require("torchao.quantization", "int8")
        made = copied(model)
        if not any(type(module) is nn.Linear for module in made.modules()):
            msg = "the model has no linear layer: quantize convolutions in an ONNX file, with quantize_onnx"
            raise ExportError(msg)
        config = torchao.Int8DynamicActivationInt8WeightConfig() if activations else torchao.Int8WeightOnlyConfig()
        torchao.quantize_(made, config)
    return made
