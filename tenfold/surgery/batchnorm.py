"""Re-estimation of batch-norm statistics from unlabeled batches, without training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tenfold.errors import DataError
from tenfold.tensors import normal_tensors
from tenfold.tracing.contexts import device_of, evaluating, layer_by_layer, same_random_numbers
from tenfold.tracing.held_tensors import leave_inference_
from tenfold.tracing.input_batches import input_batches
from tenfold.tracing.inputs import call_model, shape_of, tensors_in

M = TypeVar("M", bound=nn.Module)

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@normal_tensors()
def reestimate_batchnorm_(
    model: M, batches: Iterable[Any], *, forward: Callable[[M, Any], object] | None = None
) -> int:
    """Re-estimate the running statistics of every batch norm, and return the number of batches used.

    Use it after compressing a model by its weights alone. Only the batch norms run in training mode, so that each layer
    sees inputs normalized as they will be; dropout stays off, and there are no gradients. The new mean and variance are
    those of all values: batches are pooled exactly (Chan, Golub & LeVeque 1983), so neither their order nor unequal
    sizes matter. ``torch``'s cumulative average (``momentum=None``) would average the variances *within* batches
    instead, and lose the variance *between* them, which is not small for small batches.

    Training modes and momenta are restored, and on any error the old statistics as well. Batch norms that the forward
    never reaches, or that do not track statistics, are left unchanged.

    Args:
        model: changed in place, on its own device. A model without batch norm is not run; the result is then 0.
        batches: inputs as ``call_model`` takes them: a tensor, tuple of arguments, dict of keywords or (args, kwargs).
            They must be on the device of the model. 100 to 200 batches are plenty.
        forward: runs the model on one batch; ``call_model(model, batch)`` by default.

    Raises:
        DataError: no batches, a batch of one value per channel, or activations that are not finite.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout())
        >>> reestimate_batchnorm_(model, [torch.randn(16, 4) for _ in range(3)])
        3
    """
    leave_inference_(model)
    norms: dict[str, _BatchNorm] = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, BATCH_NORMS) and module.running_mean is not None and module.running_var is not None
    }
    if not norms:
        return 0
    pools = {path: _Pool(path) for path in norms}
    seen = 0
    with _statistics_only(model, norms, pools):
        read = batches if forward is not None else input_batches(batches, model)
        for seen, batch in enumerate(read, start=1):  # noqa: B007
            (forward or call_model)(model, batch)
        if seen == 0:
            msg = "there are no batches to re-estimate batch norm from. Pass an iterable with at least one batch."
            raise DataError(msg)
        for path, pool in pools.items():
            if pool.calls:
                pool.store(norms[path])
    return seen


@dataclass
class _Pool:
    """Count, mean and sum of squared deviations of all values seen by one batch norm, per channel in float64."""

    path: str
    count: int = 0
    calls: int = 0
    rows: int = 0  # of the last batch
    low: tuple[Tensor, Tensor] | None = None  # variance and mean of the last batch, where the norm is in 16 bits
    mean: Tensor = field(default_factory=lambda: torch.zeros((), device="cpu"))
    squares: Tensor = field(default_factory=lambda: torch.zeros((), device="cpu"))

    def check(self, norm: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        """Reject inputs with fewer than two values per channel, which have no variance; a forward pre-hook."""
        x = next(tensors_in((args, kwargs)))
        shape = shape_of(x)
        self.rows = prod(shape) // norm.num_features
        if self.rows < 2:
            msg = (
                f"batch norm {self.path!r} got an input of shape {shape}: one value per channel has no "
                "variance. Use larger batches and drop a last batch of one."
            )
            raise DataError(msg)
        self.low = None
        if norm.running_var.dtype not in (torch.float32, torch.float64):  # would round what is read from it
            self.low = torch.var_mean(x.float().transpose(0, 1).flatten(1), 1)

    def update(self, norm: Any, _args: tuple[Tensor, ...], _output: Tensor) -> None:
        """Pool the statistics of the last batch; a forward hook."""
        if not (torch.isfinite(norm.running_mean).all() and torch.isfinite(norm.running_var).all()):
            msg = (
                f"the input of batch norm {self.path!r} is not finite in its call {self.calls + 1}: check the batches "
                "and the weights before it. The old statistics are kept."
            )
            raise DataError(msg)
        count = self.rows
        variance, mean = (t.double() for t in self.low or (norm.running_var, norm.running_mean))
        squares = variance * (count - 1)
        total, delta = self.count + count, mean - self.mean.to(mean.device)
        self.mean = self.mean.to(mean.device) + delta * (count / total)
        self.squares = self.squares.to(mean.device) + squares + delta.square() * (self.count * count / total)
        self.count, self.calls = total, self.calls + 1

    def store(self, norm: _BatchNorm) -> None:
        """Write mean and unbiased variance into the running statistics of ``norm``."""
        norm.running_mean.copy_(self.mean)  # type: ignore[union-attr]
        norm.running_var.copy_(self.squares / (self.count - 1))  # type: ignore[union-attr]
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.fill_(self.calls)


@contextmanager
def _statistics_only(model: nn.Module, norms: dict[str, _BatchNorm], pools: dict[str, _Pool]) -> Iterator[None]:
    """Run only the batch norms in training mode, and pool the statistics of each batch."""
    # Momentum 1 makes the running statistics those of the last batch alone, which a hook reads at no cost. Flags are
    # set directly, because ``train()`` would also reach the children of some batch norms (timm's, for instance).
    momenta = [(norm, norm.momentum) for norm in norms.values()]
    old = [(buffer, buffer.clone()) for norm in norms.values() for buffer in norm.buffers(recurse=False)]
    try:
        with ExitStack() as stack:
            for context in (evaluating(model), layer_by_layer(), same_random_numbers(device_of(model))):
                stack.enter_context(context)
            for path, norm in norms.items():
                norm.training, norm.momentum = True, 1.0
                norm.reset_running_stats()  # 0 · NaN is NaN: broken statistics must not survive a momentum of 1
                stack.enter_context(norm.register_forward_pre_hook(pools[path].check, with_kwargs=True))
                stack.enter_context(norm.register_forward_hook(pools[path].update))
            yield
        unreached = {
            id(b) for path, norm in norms.items() if not pools[path].calls for b in norm.buffers(recurse=False)
        }
        _put_back([(buffer, value) for buffer, value in old if id(buffer) in unreached])
    except BaseException:
        _put_back(old)
        raise
    finally:
        for norm, momentum in momenta:
            norm.momentum = momentum


def _put_back(values: list[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for buffer, value in values:
            buffer.copy_(value)
