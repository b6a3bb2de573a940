"""One record of a model's data flow: which module made which tensor, what took it, and which weights were read.

Use :func:`trace` for one run of a model, and ask the :class:`Trace`. Where a question has to be answered during the run
(stop at an addition), or the run is watched by others as well, open a :class:`Tracer` around it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _current_graph_task_id
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import TensorWeakRef

from tenfold.records import Shape
from tenfold.tensors import untransformed, version_of
from tenfold.tracing.contexts import evaluating, layer_by_layer
from tenfold.tracing.inputs import call_model, shape_of, tensors_in
from tenfold.tracing.watchers import ModuleCall, Operation, Watcher, computes

_ADDITIONS = {torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor, torch.ops.aten.add.out}


@dataclass(frozen=True)
class Use:
    """An operation that took a value, or the return of the model.

    Attributes:
        by: path of the innermost module that ran, empty for the model itself.
        added: whether it added another tensor of the same shape, once.
    """

    by: str
    added: bool = False


@dataclass(eq=False)
class Value:
    """A tensor that a module returned, until it is changed in place; what it is then is another value.

    Attributes:
        shape: of the tensor.
        makers: paths of the modules that returned it, innermost first: a layer, dropout that did nothing, the block
            around both. Empty if something else changed a tensor in place.
        uses: what took it, in order. A view of it is a use; what hands it on unchanged is none.
        changed_from: the value that the tensor had before it was changed in place.
    """

    shape: Shape
    makers: list[str] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    changed_from: Value | None = None


@dataclass(eq=False)
class Trace:
    """The data flow of one run of a model, by paths of its modules. No tensor is held.

    Attributes:
        calls: how often each module ran.
        spans: when each module first started and last ended, in steps of a counter.
        values: the tensors that modules returned as they are, not inside a container, in order.
        read_outside: modules whose own weights something computed with while they did not run.
    """

    calls: Counter[str] = field(default_factory=Counter)
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    values: list[Value] = field(default_factory=list)
    read_outside: set[str] = field(default_factory=set)

    def taken_by(self, path: str) -> Value | None:
        """Return the first value that the module at ``path`` took itself; None if it took none."""
        return next((value for value in self.values if any(use.by == path for use in value.uses)), None)

    def is_added(self, path: str) -> bool:
        """Return whether all that is made of a module's output is its sum with another tensor of its shape."""
        use = self._only_use(path)
        return use is not None and use.added

    def follower(self, path: str) -> str | None:
        """Return the module that took the output of this one, and that nothing else took; None if there is none.

        It runs once, like this one, and nothing has changed the output in place before.
        """
        use = self._only_use(path)
        if use is None or self.calls[use.by] != 1 or not use.by or f"{path}.".startswith(f"{use.by}."):
            return None
        return use.by

    def _only_use(self, path: str) -> Use | None:
        uses = [use for value in self.values if path in value.makers for use in value.uses]
        return uses[0] if len(uses) == self.calls[path] == 1 else None


def trace(
    model: nn.Module,
    inputs: Any,
    *,
    forward: Callable[[nn.Module, Any], object] | None = None,
    watchers: Iterable[Watcher] = (),
) -> Trace:
    """Run a model once, in evaluation mode, and return the record of its data flow.

    Args:
        model: unchanged afterwards.
        inputs: example inputs as ``forward`` takes them.
        forward: runs the model on the inputs; ``call_model`` by default.
        watchers: see the run as well.

    Example:
        >>> found = trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), torch.zeros(1, 2))
        >>> found.follower("0"), found.is_added("0"), found.read_outside
        ('1', False, set())
    """
    with evaluating(model), layer_by_layer(), Tracer(dict(model.named_modules()), watchers=watchers) as record:
        (forward or call_model)(model, inputs)
    return record


class Tracer(TorchDispatchMode):
    """A context that writes a :class:`Trace` of what runs while it is open.

    Every operation that reaches torch's dispatcher is seen, those of scripted code included; modules are followed by
    hooks, except scripted ones, which take none.

    Args:
        modules: the modules to follow, by path.
        on_addition: called with the tensor that is about to be added, once and in its shape, to what a module returned.
            It may raise to end the run.
        watchers: see the run as well.
    """

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler at the first operation, which takes a second and 70 MiB

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        *,
        on_addition: Callable[[Tensor], None] | None = None,
        watchers: Iterable[Watcher] = (),
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._trace = Trace()
        self._modules = {p: m for p, m in modules.items() if not isinstance(m, torch.jit.ScriptModule)}
        self._on_addition, self._watchers = on_addition, tuple(watchers)
        self._running: list[ModuleCall] = []
        self._aside = False
        self._lent: dict[ModuleCall, list[tuple[Tensor, Tensor]]] = {}  # to calls in progress, with what it stands for
        self._clock = count()
        self._known: dict[int, _Known] = {}
        self._weights = _weights_by_storage(self._modules)
        self._hooks = ExitStack()

    def __enter__(self) -> Trace:
        with ExitStack() as stack:
            for path, module in self._modules.items():
                stack.enter_context(
                    module.register_forward_pre_hook(self._entering(path), prepend=True, with_kwargs=True)
                )
                # before the hooks of others, which may change the output
                stack.enter_context(module.register_forward_hook(self._leaving(path), prepend=True))
            super().__enter__()  # type: ignore[no-untyped-call]
            self._hooks = stack.pop_all()
        return self._trace

    def __exit__(self, *error: object) -> None:
        with self._hooks:
            super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note what the operation takes, and call it."""
        kwargs = kwargs or {}
        if self._aside:
            return func(*args, **kwargs)
        taken = {id(tensor): tensor for tensor in tensors_in((args, kwargs))}
        for tensor in taken.values():
            value = self._value_of(tensor)
            if value is not None:
                other = addend(func, args, kwargs, tensor)
                value.uses.append(Use(self._innermost, other is not None))
                if other is not None and value.makers and self._on_addition is not None:
                    self._on_addition(other)
        result = self._operate(func, args, kwargs, list(taken.values()))
        if not _in_backward() and computes(func) and any(True for _ in tensors_in(result)):
            for tensor in taken.values():
                self._note_weight(tensor)
        return result

    @property
    def _innermost(self) -> str:
        return self._running[-1].path if self._running else ""

    def _operate(self, func: Any, args: Any, kwargs: Any, taken: Sequence[Tensor]) -> Any:
        compute: Callable[[], Any] = partial(func, *args, **kwargs)
        for watcher in self._watchers:
            compute = partial(watcher.operate, Operation(func, args, kwargs, tuple(self._running), compute, taken))
        return compute()

    def _entering(self, path: str) -> Callable[..., Any]:
        def enter(_module: nn.Module, args: Any, kwargs: Any) -> Any:
            self._trace.calls[path] += 1
            self._running.append(ModuleCall(path, self._trace.calls[path]))
            if path not in self._trace.spans:
                self._trace.spans[path] = (next(self._clock), 0)
            if any(watcher.apart for watcher in self._watchers):
                args, kwargs = self._apart(args, kwargs)
            with self._unseen():
                for watcher in self._watchers:
                    watcher.enter(tuple(self._running), (args, kwargs))
            return args, kwargs

        return enter

    def _leaving(self, path: str) -> Callable[..., None]:
        def leave(_module: nn.Module, _args: Any, output: Any) -> Any:
            while self._running:
                call = self._running.pop()
                if call.path == path:
                    break  # others ended with an error that was caught
            self._trace.spans[path] = (self._trace.spans[path][0], next(self._clock))
            output = self._taken_back(call, output)
            if isinstance(output, Tensor) and untransformed(output) is output:  # else it ends with its transform
                (self._value_of(output) or self._start(output)).makers.append(path)
            if not path:
                for value in map(self._value_of, tensors_in(output)):
                    if value is not None:
                        value.uses.append(Use(path))
            with self._unseen():
                for watcher in self._watchers:
                    watcher.leave(call, tuple(self._running), output)
            return output

        return leave

    @contextmanager
    def _unseen(self) -> Iterator[None]:
        """Let operations pass that are not the model's."""
        self._aside = True
        try:
            yield
        finally:
            self._aside = False

    def _apart(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Return the arguments with other tensors on the same memory, which have the same values to this record."""
        made: dict[int, tuple[Tensor, Tensor]] = {}

        def lend(tensor: Any) -> Any:
            if type(tensor) is tuple:
                return tuple(lend(each) for each in tensor)
            if (
                type(tensor) is not Tensor
                or tensor.layout != torch.strided
                or (tensor.is_leaf and tensor.requires_grad)
            ):
                return tensor
            if id(tensor) not in made:
                with self._unseen():
                    made[id(tensor)] = torch.ops.aten.alias(tensor), tensor
                self._identify(*made[id(tensor)])
            return made[id(tensor)][0]

        lent = lend(args), {name: lend(value) for name, value in kwargs.items()}
        self._lent[self._running[-1]] = list(made.values())
        return lent

    def _taken_back(self, call: ModuleCall, output: Any) -> Any:
        """Return the output of a call, with the tensors that it was meant to take where it hands on those it took."""
        lent = self._lent.pop(call, [])
        for other, tensor in lent:
            self._identify(tensor, other)

        def back(value: Any) -> Any:
            if type(value) is tuple:
                return tuple(back(each) for each in value)
            return next((tensor for other, tensor in lent if other is value), value)

        return back(output) if lent else output

    def _identify(self, tensor: Tensor, other: Tensor) -> None:
        """Let a tensor have the value of another one."""
        for watcher in self._watchers:
            watcher.identify(tensor, other)
        value = self._value_of(other)
        if value is not None:
            self._known[id(tensor)] = _Known(TensorWeakRef(tensor), version_of(tensor), value)

    def _value_of(self, tensor: Tensor) -> Value | None:
        known = self._known.get(id(tensor))
        if known is None or known.tensor() is not tensor:
            return None
        return known.value if known.version == version_of(tensor) else self._start(tensor, known.value)

    def _start(self, tensor: Tensor, changed_from: Value | None = None) -> Value:
        value = Value(shape_of(tensor), changed_from=changed_from)
        self._trace.values.append(value)
        self._known[id(tensor)] = _Known(TensorWeakRef(tensor), version_of(tensor), value)
        return value

    def _note_weight(self, tensor: Tensor) -> None:
        weights = self._weights.get(storage_of(tensor), ())
        owners = {path for path, start, stop in weights if start <= tensor.storage_offset() < stop}
        if not owners.intersection(call.path for call in self._running):
            self._trace.read_outside |= owners


@dataclass(frozen=True, eq=False)
class _Known:
    """A tensor that has a value. A weak reference tells whether the id is still its own, and keeps no memory."""

    tensor: TensorWeakRef
    version: int | None
    value: Value


def addend(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], tensor: Tensor) -> Tensor | None:
    """Return what an operation adds to this very tensor: another one of the same shape, once; None for any other.

    Example:
        >>> x, y = torch.ones(2), torch.ones(2)
        >>> addend(torch.ops.aten.add.Tensor, (x, y), {}, x) is y
        True
    """
    if func not in _ADDITIONS or kwargs.get("alpha", 1) != 1:
        return None
    others = [operand for operand in args if operand is not tensor]
    if len(args) != 2 or len(others) != 1 or not isinstance(others[0], Tensor):
        return None
    return others[0] if others[0].shape == tensor.shape else None


def _in_backward() -> bool:
    """Whether the backward pass runs, of a forward that takes gradients: it needs the weights of whatever layer."""
    return _current_graph_task_id() != -1  # as torch.utils.checkpoint asks


def _weights_by_storage(modules: Mapping[str, nn.Module]) -> dict[int | None, list[tuple[str, int, int]]]:
    """Return (path, first element, end) of every parameter by its storage, by which views of it are known as well."""
    weights: dict[int | None, list[tuple[str, int, int]]] = {}
    for path, module in modules.items():
        for parameter in module.parameters(recurse=False):
            key = storage_of(parameter)
            if key is not None:
                start = int(parameter.storage_offset())
                weights.setdefault(key, []).append((path, start, start + parameter.numel()))
    return weights


def storage_of(tensor: Tensor) -> int | None:
    """Return what tells the memory of a tensor from others, as long as it is in use; None if it has none of its own."""
    try:
        return int(StorageWeakRef(tensor.untyped_storage()).cdata)
    except RuntimeError:
        return None  # sparse tensors have none
