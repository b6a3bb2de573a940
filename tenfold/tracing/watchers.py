"""What sees the operations and module calls of a run while they happen: see ``Tracer``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor


@dataclass(frozen=True, eq=False)
class ModuleCall:
    """One run of a module: of that at ``path``, the ``number``-th of the forward, from 1."""

    path: str
    number: int


@dataclass(frozen=True, eq=False)
class Operation:
    """An operation that is about to run on ``inputs``, within the calls of modules in ``running``, outermost first."""

    func: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    running: tuple[ModuleCall, ...]
    compute: Callable[[], Any]
    inputs: Sequence[Tensor]

    @property
    def name(self) -> str:
        """Without the overload."""
        return name_of(self.func)

    @property
    def by_name(self) -> dict[str, Any]:
        """The arguments that were given, by name."""
        schema = getattr(self.func, "_schema", None)
        names = () if schema is None else [argument.name for argument in schema.arguments]
        return dict(zip(names, self.args, strict=False)) | dict(self.kwargs)


class Watcher:
    """Sees what a ``Tracer`` sees, while it happens.

    Attributes:
        apart: give every call tensors of its own to take, which share memory with those it was given: so a tensor that
            it took is distinguished from the same one in other hands.
    """

    apart: ClassVar[bool] = False

    def enter(self, running: tuple[ModuleCall, ...], inputs: Any) -> None:
        """Follow the start of ``running[-1]``."""

    def leave(self, call: ModuleCall, running: tuple[ModuleCall, ...], output: Any) -> None:
        """Follow the end of a call; ``running`` are those around it."""

    def identify(self, tensor: Tensor, other: Tensor) -> None:
        """Follow that a tensor stands for another one, with which it shares its values."""

    def operate(self, operation: Operation) -> Any:
        """Return the result of an operation: what it computes, unless something else is to stand for it."""
        return operation.compute()


def name_of(func: Any) -> str:
    """Return the name of an operation without its overload."""
    return str(getattr(getattr(func, "overloadpacket", func), "__name__", ""))


def computes(func: Any) -> bool:
    """Whether an operation looks at numbers: it makes no view of a tensor, and no tensor that is merely like it."""
    name = name_of(func)
    return not (getattr(func, "is_view", False) or name.startswith("new_") or name.endswith("_like"))
