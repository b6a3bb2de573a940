"""References to modules from anywhere in a model: containers, functions, methods and objects, besides its children.

``nn.Module`` knows its children only. A forward may as well reach a layer through a plain list, the closure of a
function, a ``functools.partial`` or a bound method that was kept in a dict.
"""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict, deque
from collections.abc import Container, Iterator, Mapping
from functools import partial
from types import CellType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tenfold.tracing.held_tensors import held_tensors, without_graphs

Model = TypeVar("Model", bound=nn.Module)

_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size})
_CONTAINERS = frozenset({dict, OrderedDict, list, tuple, set, frozenset})
_LEAVES = (type, ModuleType, torch.jit.ScriptModule)  # nothing in them can be replaced


def copied(model: Model) -> Model:
    """Return a deep copy of a model whose functions refer to the copy's own modules.

    ``copy.deepcopy`` shares functions and weak references, so that a lambda kept on the copy would run the layers of
    the original. What was made in inference mode is a normal tensor in the copy, and what a forward has kept with its
    graph is without it.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> def running(layer):
        ...     return lambda x: layer(x)
        >>> model.body = running(model[0])
        >>> twin = copied(model)
        >>> twin.body.__closure__[0].cell_contents is twin[0]
        True
    """
    memo = without_graphs(model)
    with torch.no_grad():  # else parameters of scripted parts would be copied with a graph, and could not be trained
        twin = copy.deepcopy(model, memo)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in twin.named_parameters():
        if name in trained:
            parameter.requires_grad_()
    reached = _Walk({})
    reached.run(model)
    new: dict[int, Any] = {}
    cells: dict[int, CellType] = {}
    for value in reached.values():
        if isinstance(value, FunctionType) and _reaches(value, memo):
            new[id(value)] = _function_copied(value, memo, cells)
        elif type(value) is weakref.ref and id(value()) in memo:
            new[id(value)] = weakref.ref(memo[id(value())])
    if new:
        _Walk(new, shared=reached.seen).run(twin)
    return twin


def trainable_copy(model: Model) -> Model:
    """Return the model, or a copy if it holds tensors that were made in inference mode: no gradient passes them."""
    return copied(model) if any(t.is_inference() for t in held_tensors(model)) else model


def redirect_(model: nn.Module, new: Mapping[int, Any]) -> None:
    """Let everything in a model that refers to some objects refer to others, in place.

    Args:
        model: where to look, through its modules and whatever they hold.
        new: what takes the place of an object, by the ``id`` of that.
    """
    _Walk(new).run(model)


class _Walk:
    """A way through all objects that one refers to, which puts others in their places.

    Objects that can be changed are changed where they are; tuples, partials and methods are made again.
    """

    def __init__(self, new: Mapping[int, Any], shared: Container[int] = (), stop: Container[int] = ()) -> None:
        self.new = new
        self.seen: dict[int, tuple[Any, Any]] = {}  # the object, which keeps its id taken, and what stands for it
        self._shared = shared  # objects that are left as they are, since others use them
        self._stop = stop  # objects that are not looked into
        self._todo: list[Any] = []

    def run(self, start: Any) -> None:
        """Go through all that can be reached."""
        self._stand_in(start)
        while self._todo:  # no recursion: chains of objects may be long
            self._look_into(self._todo.pop())

    def values(self) -> Iterator[Any]:
        """Iterate over the objects that were reached."""
        return (value for value, _ in self.seen.values())

    def _stand_in(self, value: Any) -> Any:
        """Return what stands for a value from now on, to be looked into later."""
        kind = type(value)
        if kind in _ATOMS or (kind in _CONTAINERS and not value) or isinstance(value, _LEAVES):
            return value  # modules hold many empty dicts, for hooks
        if id(value) in self.seen:
            return self.seen[id(value)][1]
        made = self.new.get(id(value), value)
        if made is value:
            if id(value) in self._shared:
                return value
            made = self._made_again(value)
        for key in (value, made):
            self.seen[id(key)] = (key, made)
        if id(value) not in self._stop and not isinstance(value, Tensor):
            self._todo.append(made)
        return made

    def _made_again(self, value: Any) -> Any:
        """Return a value that cannot be changed with others in it; the value itself if it stays as it is."""
        if type(value) is tuple or type(value) is frozenset or (hasattr(value, "_fields") and isinstance(value, tuple)):
            inside = [self._stand_in(v) for v in value]
            if all(map(_same, inside, value)):
                return value
            return type(value)(*inside) if hasattr(value, "_fields") else type(value)(inside)
        if isinstance(value, partial):
            func, args = self._stand_in(value.func), self._stand_in(value.args)
            same = func is value.func and args is value.args
            return value if same else type(value)(func, *args, **value.keywords)
        if isinstance(value, MethodType):
            return self._method(value)
        if type(value) is weakref.ref:
            target = self._stand_in(value())
            return value if target is value() else weakref.ref(target)
        return value

    def _method(self, value: MethodType) -> Any:
        owner = self._stand_in(value.__self__)
        if owner is value.__self__:
            return value
        name = value.__func__.__name__
        own = getattr(type(value.__self__), name, None) is value.__func__ and hasattr(owner, name)
        return getattr(owner, name) if own else MethodType(value.__func__, owner)

    def _look_into(self, holder: Any) -> None:
        """Replace what an object holds, where it stands."""
        if isinstance(holder, list | deque):
            for i, value in enumerate(holder):
                made = self._stand_in(value)
                if made is not value:
                    holder[i] = made
        elif isinstance(holder, set):
            inside = [self._stand_in(value) for value in holder]
            if not all(value in holder for value in inside):
                holder.clear()
                holder.update(inside)
        elif isinstance(holder, FunctionType):
            self._redirect_function(holder)
        for own in _dicts(holder):
            self._redirect_dict(own)
        for slot, value in _slots(holder):
            made = self._stand_in(value)
            if made is not value:
                slot.__set__(holder, made)

    def _redirect_dict(self, holder: dict[Any, Any]) -> None:
        inside = {self._stand_in(key): self._stand_in(value) for key, value in list(holder.items())}
        if not all(map(_same, inside, holder)):
            holder.clear()
        elif all(map(_same, inside.values(), holder.values())):
            return
        holder.update(inside)

    def _redirect_function(self, function: FunctionType) -> None:
        for cell in filter(_is_filled, function.__closure__ or ()):
            made = self._stand_in(cell.cell_contents)
            if made is not cell.cell_contents:
                cell.cell_contents = made
        made = self._stand_in(function.__defaults__)
        if made is not function.__defaults__:
            function.__defaults__ = made


def _same(one: Any, other: Any) -> bool:
    return one is other


def _is_filled(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _dicts(holder: Any) -> Iterator[dict[Any, Any]]:
    """Iterate over the dicts that an object consists of."""
    if isinstance(holder, dict):
        yield holder
    elif isinstance(holder, partial):
        yield holder.keywords
    elif isinstance(holder, FunctionType) and holder.__kwdefaults__:
        yield holder.__kwdefaults__
    try:
        own = object.__getattribute__(holder, "__dict__")
    except AttributeError:
        return
    if isinstance(own, dict):
        yield own


def _slots(holder: Any) -> Iterator[tuple[MemberDescriptorType, Any]]:
    """Iterate over the slots of an object that are filled, with what they hold."""
    for kind in type(holder).__mro__:
        if "__slots__" in vars(kind):
            for slot in vars(kind).values():
                if isinstance(slot, MemberDescriptorType):
                    try:
                        yield slot, slot.__get__(holder)
                    except AttributeError:
                        continue


def _reaches(value: Any, memo: Mapping[int, Any]) -> bool:
    """Whether a value leads to something that was copied."""
    walk = _Walk({}, stop=memo)
    walk.run(value)
    return any(id(v) in memo for v in walk.values())


def _function_copied(function: FunctionType, memo: dict[int, Any], cells: dict[int, CellType]) -> FunctionType:
    """Return a function with the same code that refers to copies; cells that functions share stay shared."""

    def value_copied(value: Any) -> Any:
        return copy.deepcopy(value, memo) if _reaches(value, memo) else value

    def cell_copied(cell: CellType) -> CellType:
        if id(cell) not in cells:
            inside = _is_filled(cell) and _reaches(cell.cell_contents, memo)
            cells[id(cell)] = CellType(copy.deepcopy(cell.cell_contents, memo)) if inside else cell
        return cells[id(cell)]

    closure = None if function.__closure__ is None else tuple(map(cell_copied, function.__closure__))
    defaults = value_copied(function.__defaults__)
    made = FunctionType(function.__code__, function.__globals__, function.__name__, defaults, closure)
    made.__kwdefaults__ = value_copied(function.__kwdefaults__)
    made.__dict__.update(function.__dict__)
    for name in ("__qualname__", "__module__", "__doc__", "__annotations__"):
        setattr(made, name, getattr(function, name))
    return made
