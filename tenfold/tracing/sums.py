"""Sums that the outputs of modules go into, seen while a model runs: where branches meet their shortcuts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tenfold.tracing.inputs import tensors_in

# What +, += and the functions of ``operator`` arrive as, in this or another version of torch.
_ADDITIONS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__, Tensor.__radd__}


def addend(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], tensor: Tensor) -> Tensor | None:
    """Return what a call adds to this very tensor: another one of the same shape, once; None for any other call.

    Example:
        >>> x, y = torch.ones(2), torch.ones(2)
        >>> addend(torch.add, (x, y), {}, x) is y, addend(torch.mul, (x, y), {}, x) is None
        (True, True)
    """
    if func not in _ADDITIONS or kwargs.get("alpha", 1) != 1:
        return None
    operands = [*args, *(kwargs[name] for name in ("input", "other") if name in kwargs)]
    others = [operand for operand in operands if operand is not tensor]
    if len(operands) != 2 or len(others) != 1 or not isinstance(others[0], Tensor):
        return None
    return others[0] if others[0].shape == tensor.shape else None


@dataclass(eq=False)
class Made:
    """What a module put out, and how often something else was made of it.

    Attributes:
        tensor: held, so that its id stays its own.
        version: of the tensor when it was put out; operations in place raise it.
        makers: the modules that put it out: a layer, dropout that did nothing, the block around both.
        uses: calls that made something else of it.
        sums: those of them that added a tensor of the same shape.
    """

    tensor: Tensor
    version: int
    makers: list[str] = field(default_factory=list)
    uses: int = 0
    sums: int = 0


class Uses(TorchFunctionMode):
    """While it is on, counts what functions make of the outputs of modules that it was told of.

    A tensor is known by its identity. A function that hands it on as it is (dropout in evaluation, ``contiguous``) or
    only asks for its shape does not count; one that changes it in place does, and what then goes on is another output.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: list[Made] = []
        self._last: dict[int, Made] = {}

    def __iter__(self) -> Iterator[Made]:
        """Iterate over all outputs, in the order in which they were made."""
        return iter(self._made)

    def add(self, path: str, tensor: Tensor) -> None:
        """Note that the module at ``path`` put out this tensor."""
        version = _version(tensor)
        if version is None:
            return
        made = self.of(tensor)
        if made is None:
            made = self._last[id(tensor)] = Made(tensor, version)
            self._made.append(made)
        made.makers.append(path)

    def of(self, tensor: Tensor | None) -> Made | None:
        """Return who put out this tensor; None if no module did, or if it was changed in place since."""
        made = self._last.get(id(tensor))
        return made if made is not None and _version(made.tensor) == made.version else None

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function; count what it made anything of."""
        kwargs = kwargs or {}
        taken = [made for tensor in tensors_in((args, kwargs)) if (made := self.of(tensor)) is not None]
        result = func(*args, **kwargs)
        for made in taken:
            if self.of(made.tensor) is not made or any(t is not made.tensor for t in tensors_in(result)):
                made.uses += 1
                made.sums += addend(func, args, kwargs, made.tensor) is not None
        return result


class UntilAdded(TorchFunctionMode):
    """While it is on, calls ``met`` with what is about to be added to the output that it is to ``expect``."""

    def __init__(self, met: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._awaited: Tensor | None = None
        self._met = met

    def expect(self, _module: nn.Module, _args: Any, output: Any) -> None:
        """Wait for the sum of this output; a forward hook."""
        self._awaited = output

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, unless ``met`` raises."""
        kwargs = kwargs or {}
        if self._awaited is not None:
            other = addend(func, args, kwargs, self._awaited)
            if other is not None:
                self._met(other)
        return func(*args, **kwargs)


def _version(tensor: Tensor) -> int | None:
    """Return how often the tensor was changed in place; None where torch does not count."""
    return None if tensor.is_inference() else tensor._version  # noqa: SLF001 - torch's own count
