"""Blocks that a model repeats, and how one of them is called: what enters it, and what the original puts out there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.tracing.contexts import layer_by_layer
from tenfold.tracing.inputs import call_model, tensors_in
from tenfold.tracing.randomness import Randomness


class _Reached(BaseException):
    """Raised where the forward has come as far as was asked for; no error, so that nothing on the way catches it."""


@dataclass(frozen=True, eq=False)
class BlockCall:
    """The arguments of one call of a block."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module) -> Tensor:
        """Return the first tensor that the block puts out."""
        return next(tensors_in(block(*self.args, **self.kwargs)))


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
    with _hooked([child.register_forward_pre_hook(_noting(path, calls)) for path, child in found.items()]):
        _run(model, batch)
    return tuple(path for path in dict.fromkeys(calls) if calls.count(path) == 1)


def call_of(model: nn.Module, path: str, batch: Any) -> BlockCall:
    """Return how the block at ``path`` is called; what comes after it does not run."""
    seen: list[BlockCall] = []

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(BlockCall(args, kwargs))
        raise _Reached

    with _hooked([model.get_submodule(path).register_forward_pre_hook(enter, with_kwargs=True)]):
        _run(model, batch)
    return seen[0]


def output_of(model: nn.Module, path: str, batch: Any) -> Tensor:
    """Return the first tensor that the block at ``path`` puts out; what comes after it does not run."""
    seen: list[Tensor] = []

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.append(next(tensors_in(output)).detach())
        raise _Reached

    with _hooked([model.get_submodule(path).register_forward_hook(leave)]):
        _run(model, batch)
    return seen[0]


def _run(model: nn.Module, batch: Any) -> None:
    """Run a model without gradients and without a cache of keys and values, which every further call would add to."""
    with torch.no_grad(), layer_by_layer(), _without_cache(model), Randomness(model, batch).seeded(0):
        try:
            call_model(model, batch)
        except _Reached:
            return


def _noting(path: str, calls: list[str]) -> Callable[..., None]:
    return lambda *_: calls.append(path)


@contextmanager
def _hooked(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    known: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    caching = [config for config in known if getattr(config, "use_cache", False)]
    try:
        for config in caching:
            config.use_cache = False
        yield
    finally:
        for config in caching:
            config.use_cache = True
