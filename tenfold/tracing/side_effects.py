"""What modules do besides returning tensors: draw random numbers, and leave values where others find them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from tenfold.tracing.inputs import tensors_in
from tenfold.tracing.memory import attributes
from tenfold.tracing.randomness import Randomness, State, same_state
from tenfold.tracing.trace import storage_of
from tenfold.tracing.watchers import ModuleCall, Operation, Watcher


class SideEffects(Watcher):
    """Finds the modules that cannot be left out of a forward, although what they return is known.

    A tensor that was made within a module, or handed to it, and that something reads after the module has ended, must
    have been returned by it. Otherwise the module keeps it where others find it: in an attribute, a list that hooks
    fill, a global dictionary. The same holds of a module that writes to a tensor that it neither made nor was given.

    Attributes:
        draws: paths of the modules in whose calls random numbers were drawn.
        leaves: paths of the modules that leave values behind.
        hidden: whether some were found that no attribute of a module holds, which ``Memory`` does not set back.
    """

    apart = True

    def __init__(self, model: nn.Module, randomness: Randomness) -> None:
        self.draws: set[str] = set()
        self.leaves: set[str] = set()
        self.hidden = False
        self._model, self._randomness = model, randomness
        self._starts: dict[ModuleCall, State] = {}
        self._given: dict[ModuleCall, set[int | None]] = {}
        self._within = WeakTensorKeyDictionary()  # the calls within which a tensor came to be
        self._memory: dict[int | None, tuple[ModuleCall, ...]] = {}  # the same of its storage

    def enter(self, running: tuple[ModuleCall, ...], inputs: Any) -> None:
        """Note what a call is given, and where the generators are."""
        call, given = running[-1], list(tensors_in(inputs))
        self._starts[call] = self._randomness.state()
        self._given[call] = {storage_of(tensor) for tensor in given}
        for tensor in given:
            self._within[tensor] = running

    def leave(self, call: ModuleCall, running: tuple[ModuleCall, ...], output: Any) -> None:
        """Hand over to the caller what a call returns."""
        if not same_state(self._starts.pop(call), self._randomness.state()):
            self.draws.add(call.path)
        for tensor in tensors_in(output):
            self._read(tensor, (*running, call))
            if tensor in self._within:
                self._within[tensor] = tuple(outer for outer in self._within[tensor] if outer is not call)

    def operate(self, operation: Operation) -> Any:
        """Judge what an operation reads and writes."""
        running, generator = operation.running, operation.kwargs.get("generator")
        if generator is not None:
            self._randomness.include(generator)
            self.draws |= {call.path for call in running}
        for tensor in operation.inputs:
            self._read(tensor, running)
        written = written_by(operation)
        for tensor in written:
            key = storage_of(tensor)
            inside = self._memory.get(key, ())
            self.leaves |= {c.path for c in running if c not in inside and key not in self._given[c]}
        result = operation.compute()
        for tensor in tensors_in(result):
            self._within.setdefault(tensor, running)
            if not written and not getattr(operation.func, "is_view", False):
                self._memory[storage_of(tensor)] = running
        return result

    def _read(self, tensor: Tensor, running: tuple[ModuleCall, ...]) -> None:
        left = {call.path for call in self._within.get(tensor, ()) if call not in running}
        if left:
            self.leaves |= left
            held = (tensors_in(list(attributes(module).values())) for module in self._model.modules())
            self.hidden |= not any(kept is tensor for each in held for kept in each)


def written_by(operation: Operation) -> list[Tensor]:
    """Return the tensors that an operation writes to."""
    schema = getattr(operation.func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return list(tensors_in([operation.by_name.get(name) for name in written]))
