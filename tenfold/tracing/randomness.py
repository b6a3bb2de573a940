"""Every generator that a forward may draw random numbers from: seed them, note where they are, and set them back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from tenfold.tracing.contexts import device_of

State = tuple[Any, ...]

_HELD = (torch.Generator, random.Random, np.random.RandomState, np.random.Generator)


class Randomness:
    """The generators of torch, of the device of a model, of Python and of numpy, and those held by its modules.

    Example:
        >>> model, x = nn.Dropout(), torch.ones(100)
        >>> runs = []
        >>> for _ in range(2):
        ...     with Randomness(model).seeded(3):
        ...         runs.append(model(x))
        >>> torch.equal(*runs)
        True
    """

    def __init__(self, model: nn.Module, inputs: Any = ()) -> None:
        device = device_of(model, inputs)
        on_device = () if device.type in ("cpu", "meta") else (_DeviceGenerator(device),)
        held = (value for module in model.modules() for value in vars(module).values() if isinstance(value, _HELD))
        common: Any = (torch.default_generator, np.random.get_state, random.getstate)  # the latter two are methods
        common = [getattr(source, "__self__", source) for source in common]
        self._sources: list[Any] = list({id(source): source for source in (*common, *on_device, *held)}.values())
        self._found: dict[int, Any] = {}  # where generators were that are not seeded, by place
        self._before: list[Any] = []

    def include(self, source: Any) -> None:
        """Add a generator that is found in use: every run starts where it is now, and sets it back."""
        if all(_identity(known) != _identity(source) for known in self._sources):
            self._found[len(self._sources)] = _state(source)
            self._sources.append(source)
            self._before.append(_state(source))

    def state(self) -> State:
        """Return where all generators are."""
        return tuple(_state(source) for source in self._sources)

    def set(self, state: State) -> None:
        """Set all generators back."""
        for source, value in zip(self._sources, state, strict=False):
            _set(source, value)

    @contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        """Draw from ``seed`` on, and set the generators back at the end."""
        self._before = list(self.state())
        for place, source in enumerate(self._sources):
            if place in self._found:
                _set(source, self._found[place])
            else:
                _seed(source, seed % 2**32)
        try:
            yield
        finally:
            self.set(tuple(self._before))


def same_state(first: State, second: State) -> bool:
    """Whether two states are equal: nothing was drawn between them.

    Example:
        >>> known = Randomness(nn.Identity())
        >>> same_state(known.state(), known.state())
        True
    """
    return all(map(_equal, first, second))


class _DeviceGenerator:
    """The generator of an accelerator, with the methods of ``torch.Generator``."""

    def __init__(self, device: torch.device) -> None:
        self._module, self._device = torch.get_device_module(device), device

    def get_state(self) -> Any:
        return self._module.get_rng_state(self._device)

    def set_state(self, state: Any) -> None:
        self._module.set_rng_state(state, self._device)

    def manual_seed(self, seed: int) -> None:
        with self._module.device(self._device):
            self._module.manual_seed(seed)


def _identity(source: Any) -> tuple[type, int]:
    """Return what two objects have in common that torch made of one generator."""
    return type(source), int(getattr(source, "_cdata", id(source)))


def _state(source: Any) -> Any:
    if isinstance(source, np.random.Generator):
        return source.bit_generator.state
    return source.getstate() if isinstance(source, random.Random) else source.get_state()


def _set(source: Any, state: Any) -> None:
    if isinstance(source, np.random.Generator):
        source.bit_generator.state = state
    elif isinstance(source, random.Random):
        source.setstate(state)
    else:
        source.set_state(state)


def _seed(source: Any, seed: int) -> None:
    if isinstance(source, np.random.Generator):
        source.bit_generator.state = type(source.bit_generator)(seed).state
    elif isinstance(source, torch.Generator | _DeviceGenerator):
        source.manual_seed(seed)
    else:
        source.seed(seed)


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return all(_equal(first[key], second[key]) for key in first)
    if isinstance(first, np.ndarray):
        return bool(np.array_equal(first, second))
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, tuple) and any(isinstance(value, np.ndarray) for value in first):
        return all(map(_equal, first, second))
    return bool(first == second)
