"""The loss that trainings have by default."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.tracing.inputs import call_model
from tenfold.tuning.loop import Loss


def logits_of(output: Any) -> Tensor:
    """Return the class scores of a model's output, or its ``logits``, in float32."""
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits.float()


def cross_entropy(smoothing: float = 0.0) -> Loss:
    """Return cross-entropy with label smoothing, in float32, of (model, inputs, labels).

    Example:
        >>> import torch
        >>> loss = cross_entropy()(nn.Identity(), torch.zeros(2, 4), torch.tensor([0, 3]))
        >>> round(loss.item(), 4)
        1.3863
    """

    def loss(model: nn.Module, inputs: Any, targets: Any) -> Tensor:
        return F.cross_entropy(logits_of(call_model(model, inputs)), targets, label_smoothing=smoothing)

    return loss
