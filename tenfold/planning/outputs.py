"""The cheap proxy: how far a layer's output moves when another layer stands in for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from tenfold.errors import DataError
from tenfold.surgery import find
from tenfold.tracing.contexts import evaluating, layer_by_layer
from tenfold.tracing.inputs import call_model, real_tokens, tensors_in, token_mask


def output_errors(model: nn.Module, path: str, substitutes: Sequence[nn.Module], batches: Iterable[Any]) -> list[float]:
    """Return for each substitute √(Σ‖y − ŷ‖² / Σ‖y − ȳ‖²): its output ŷ against the layer's own y, on real inputs.

    ȳ is the mean output of each channel. One pass serves all substitutes; the model itself runs untouched. Padding that
    the keyword ``attention_mask`` of a batch names does not count.

    Args:
        model: runs in evaluation mode, without gradients, and is as before afterwards.
        path: of the layer.
        substitutes: modules that take the same inputs as the layer.
        batches: inputs as ``call_model`` takes them, on the device of the model.

    Raises:
        DataError: no batches, or the forward never reaches the layer.

    Example:
        >>> import torch
        >>> model, same = nn.Sequential(nn.Linear(4, 3)), nn.Linear(4, 3)
        >>> same.load_state_dict(model[0].state_dict())
        <All keys matched successfully>
        >>> output_errors(model, "0", [same], [torch.randn(8, 4)])
        [0.0]
    """
    module = find(model, path)
    missed = [0.0] * len(substitutes)
    power = _Power()
    mask: Tensor | None = None

    def compare(_module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        wanted = real_tokens(next(tensors_in(output)), mask).double()
        power.add(wanted, _channel_axis(module))
        for i, substitute in enumerate(substitutes):
            found = real_tokens(next(tensors_in(substitute(*args, **kwargs))), mask).double()
            missed[i] += float((wanted - found).square().sum())

    handle = module.register_forward_hook(compare, with_kwargs=True, prepend=True)  # hooks of the layer stay with it
    try:
        with evaluating(model), layer_by_layer():
            for batch in batches:
                mask = token_mask(batch)
                call_model(model, batch)
    finally:
        handle.remove()
    total = power.variance()
    return [(value / total) ** 0.5 if total > 0 else float(value > 0) for value in missed]


def _channel_axis(module: nn.Module) -> int:
    """Return the axis of the channels in a layer's output, from the end."""
    return -1 - len(getattr(module, "kernel_size", ()))


class _Power:
    """Running sums for Σ‖y − ȳ‖² per channel, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.sum: Tensor | None = None
        self.squares = 0.0

    def add(self, output: Tensor, axis: int) -> None:
        rows = output.movedim(axis, -1).flatten(0, -2)
        self.count += len(rows)
        total = rows.sum(0)
        self.sum = total if self.sum is None else self.sum + total
        self.squares += float(rows.square().sum())

    def variance(self) -> float:
        if self.sum is None:
            msg = "there are no calibration batches, or the forward never reaches the layer"
            raise DataError(msg)
        return max(self.squares - float(self.sum.square().sum()) / self.count, 0.0)
