"""Train factorized layers as the dense layers that their factors make: the same function, at the speed of the original.

A factor is read once per step while the layer it makes runs on a whole batch, so multiplying the factors out costs
little beside one pass of thin convolutions, which wait for memory. What is trained and stored are the factors.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tenfold.layers import FactorizedLayer, build
from tenfold.tracing.contexts import device_of, same_random_numbers, synchronize

_TRIES = 3  # steps in turns, of which the fastest counts
_WORTH = 0.9  # where it saves less, noise would decide, and with it the last bits of what is trained


@contextmanager
def as_dense(model: nn.Module, *, enabled: bool = True) -> Iterator[None]:
    """Let factorized layers run as dense ones: the factors are multiplied out once per forward of the model.

    Outputs and the gradients of the factors are the same, up to rounding. Use it around a training loop of your own;
    ``finetune`` does so where ``TuneConfig.train_as`` says so. Inference is what factors are for: leave the context
    before you measure.

    Args:
        model: changed while the context is open only; its parameters are not.
        enabled: whether to do anything.

    Example:
        >>> from tenfold import Runtime, compress
        >>> net, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), torch.randn(8, 64)
        >>> small = compress(net, x, "macs=0.5", runtime=Runtime(measure=False)).model
        >>> with as_dense(small):
        ...     trained = small(x)
        >>> bool(torch.allclose(trained, small(x), atol=1e-5))
        True
    """
    layers = [module for module in model.modules() if isinstance(module, FactorizedLayer)] if enabled else []
    weights: dict[FactorizedLayer, Tensor] = {}

    def forget(*_: Any) -> None:
        weights.clear()

    handles = [model.register_forward_pre_hook(forget), model.register_forward_hook(forget, always_call=True)]
    try:
        for layer in layers:
            layer.forward = _Dense(layer, weights)  # type: ignore[method-assign, assignment]
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
        for handle in handles:
            handle.remove()


class _Dense:
    """The forward of a factorized layer by its dense weight, which is kept until the forward of the model ends."""

    def __init__(self, layer: FactorizedLayer, weights: dict[FactorizedLayer, Tensor]) -> None:
        self._layer, self._weights = layer, weights
        factor = next(layer.parameters())
        weight = nn.Parameter(factor.new_empty(layer.spec.weight_shape, device="meta"))
        self._frame = build(layer.spec, weight, layer.bias)  # type: ignore[arg-type]

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weight = self._weights.get(self._layer)
        if weight is None:
            with torch.autocast(x.device.type, enabled=False):  # products of products: not in half precision
                weight = self._layer.factorization().to_dense()
            self._weights[self._layer] = weight
        bias = self._layer.bias
        given = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        found: Tensor = functional_call(self._frame, given, (x, *args), kwargs)
        return found


def faster_as_dense(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> bool:
    """Return whether a step of training is a tenth shorter with factors multiplied out, by a few of each in turns.

    Args:
        model: stays as it is.
        loss: returns the loss of a copy of the model on a batch.
    """
    if not any(isinstance(module, FactorizedLayer) for module in model.modules()):
        return False
    device = device_of(model)
    tried = copy.deepcopy(model)
    best = {False: float("inf"), True: float("inf")}
    with same_random_numbers(device):
        for _ in range(_TRIES):
            for dense in (False, True):
                start = time.perf_counter()
                with as_dense(tried, enabled=dense):
                    loss(tried).backward()
                synchronize(device)
                best[dense] = min(best[dense], time.perf_counter() - start)
    return best[True] < _WORTH * best[False]
