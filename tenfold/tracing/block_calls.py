"""Blocks that a model repeats, and how one of them is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.tracing.contexts import layer_by_layer
from tenfold.tracing.inputs import call_model, map_tensors, tensors_in
from tenfold.tracing.randomness import Randomness


@dataclass(frozen=True, eq=False)
class BlockCall:
    """The arguments of one call of a block."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module) -> Tensor:
        """Return the first tensor that the block puts out; what it changes in place is a copy."""
        args, kwargs = map_tensors((self.args, self.kwargs), Tensor.clone)
        return next(tensors_in(block(*args, **kwargs)))


def repeated_blocks(model: nn.Module, batch: Any) -> tuple[str, ...]:
    """Return the outermost modules that stand in a row of others of their class, in the order in which they run.

    A row is a ``ModuleList`` or ``Sequential`` of two and more modules of one class that have layers within. Only
    blocks that a forward calls once: those of a recurrence have no one input.

    Example:
        >>> rows = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))
        >>> repeated_blocks(nn.Sequential(nn.Linear(4, 4), *rows), torch.ones(1, 4))
        ()
        >>> repeated_blocks(nn.Sequential(nn.Linear(4, 4), nn.Sequential(*rows)), torch.ones(1, 4))
        ('1.0', '1.1')
    """
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        children = dict(module.named_children())
        alike = len(children) > 1 and len({type(child) for child in children.values()}) == 1
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList | nn.Sequential) and alike and not inside:
            prefix = f"{path}." if path else ""
            found |= {f"{prefix}{name}": child for name, child in children.items() if any(child.children())}
    calls: list[str] = []
    with ExitStack() as stack, torch.no_grad(), layer_by_layer(), Randomness(model, batch).seeded(0):
        for path, child in found.items():
            stack.enter_context(child.register_forward_pre_hook(_noting(path, calls)))
        call_model(model, batch)
    return tuple(path for path in dict.fromkeys(calls) if calls.count(path) == 1)


def _noting(path: str, calls: list[str]) -> Callable[..., None]:
    return lambda *_: calls.append(path)


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Run a model without a cache of keys and values, which each further call of a block would add to."""
    known: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    caching = [config for config in known if getattr(config, "use_cache", False)]
    try:
        for config in caching:
            config.use_cache = False
        yield
    finally:
        for config in caching:
            config.use_cache = True
