"""Exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """The average of the trained parameters and the floating point buffers (running statistics) of a model.

    Args:
        model: in its initial state.
        decay: of the average at an update; less in the first updates, min(decay, (1 + n)/(10 + n)), so that the
            initial weights are soon forgotten.

    Attributes:
        tensors: the average by name, as in the model.

    Example:
        >>> model = nn.Linear(1, 1)
        >>> average = Average(model, decay=0.9)
        >>> _ = nn.init.constant_(model.bias, 1.0), average.tensors["bias"].zero_()
        >>> average.update_(model, 0)
        >>> round(average.tensors["bias"].item(), 3)
        0.9
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: tensor.detach().clone() for name, tensor in _averaged(model)}

    @torch.no_grad()
    def update_(self, model: nn.Module, number: int) -> None:
        """Update the average after the optimizer step of this number, counted from 0."""
        decay = min(self.decay, (1 + number) / (10 + number))
        average = get_ema_multi_avg_fn(decay)
        average(list(self.tensors.values()), [tensor.detach() for _, tensor in _averaged(model)], number)

    @torch.no_grad()
    def write_to_(self, model: nn.Module) -> None:
        """Copy the average into the model."""
        for name, tensor in _averaged(model):
            tensor.copy_(self.tensors[name])

    @contextmanager
    def shown(self, model: nn.Module) -> Iterator[None]:
        """Temporarily replace the values of the model by the average."""
        own = [(tensor, tensor.detach().clone()) for _, tensor in _averaged(model)]
        self.write_to_(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in own:
                    tensor.copy_(value)


def _averaged(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    yield from ((name, b) for name, b in model.named_buffers() if b.is_floating_point())
