"""Run a model up to one of its layers, again and again, without computing anew what is settled before it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tenfold.errors import DataError
from tenfold.tracing.contexts import evaluating, layer_by_layer
from tenfold.tracing.inputs import call_model, tensors_in

Forward = Callable[[nn.Module, Any], object]


class _Reached(BaseException):
    """Raised where the forward has come as far as was asked for; no error, so that nothing on the way catches it."""


class Replay:
    """Inputs and outputs of layers in the order in which they run, for callers that change the layers on the way.

    What ran before the layer asked for and was not changed since is taken from memory: the outputs of the largest
    modules that end before it. So a model of L layers costs about L times one layer, not L²/2.

    Hooks of a layer stay with it, whatever takes its place: what is seen is what its forward takes and returns, after
    the hooks that change its inputs and before those that change its output.

    The model runs in evaluation mode, and no batch may change what runs in which order. Layers must be asked for in the
    order of ``order``: what lies before must not change any more.

    Args:
        model: may be changed between calls, layer by layer.
        batches: inputs as ``call_model`` takes them, on the device of the model.
        forward: runs the model on one batch; ``call_model`` by default.
        limit: bytes of outputs to keep; beyond that things are computed again.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> replay = Replay(model, [torch.ones(4, 3)])
        >>> replay.order
        ('0', '1', '2')
        >>> [x.shape for x in replay.inputs("2")]
        [torch.Size([4, 3])]
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Any], *, forward: Forward | None = None, limit: int = 4 << 30
    ) -> None:
        self._model, self._batches, self._forward, self._limit = model, batches, forward or call_model, limit
        self._kept: dict[tuple[str, int], Tensor] = {}
        self._bytes = 0
        self.calls: Counter[str] = Counter()
        self._span: dict[str, tuple[int, int]] = {}
        self._follows: dict[str, str] = {}
        self._single: set[str] = set()
        self._record()

    @property
    def order(self) -> tuple[str, ...]:
        """Paths of the modules without children that ran, each at its first call."""
        leaves = [p for p in self._span if p and not any(True for _ in self._model.get_submodule(p).children())]
        return tuple(sorted(leaves, key=lambda p: self._span[p][0]))

    def start(self, path: str) -> int:
        """Return when the module at ``path`` started, on a clock of its own.

        Raises:
            DataError: the forward never reached it.
        """
        if path not in self._span:
            msg = f"the forward never reaches layer {path!r}: leave it out, or give batches that use it"
            raise DataError(msg)
        return self._span[path][0]

    def follower(self, path: str) -> str | None:
        """Return the module that took the output of this one, and that nothing else took; None if there is none.

        It runs once, like this one, and nothing has changed the output in place before.
        """
        return self._follows.get(path)

    def inputs(self, path: str) -> Iterator[Tensor]:
        """Iterate over the first input of the module at ``path``, batch by batch."""

        def enter(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            raise _Reached(next(tensors_in((args, kwargs))).detach())

        for number in range(len(self._batches)):
            module = self._model.get_submodule(path)
            yield self._run(path, number, module.register_forward_pre_hook(enter, with_kwargs=True))

    def outputs(self, path: str) -> Iterator[Tensor]:
        """Iterate over the output of the module at ``path``, batch by batch."""

        def leave(_module: nn.Module, _args: Any, output: Any) -> None:
            raise _Reached(next(tensors_in(output)).detach())

        for number in range(len(self._batches)):
            module = self._model.get_submodule(path)
            yield self._run(path, number, module.register_forward_hook(leave, prepend=True))

    def _run(self, path: str, number: int, handle: Any) -> Tensor:
        try:
            with evaluating(self._model), layer_by_layer(), self._settled(path, number):
                self._forward(self._model, self._batches[number])
        except _Reached as reached:
            found: Tensor = reached.args[0]
            return found
        finally:
            handle.remove()
        msg = (
            f"the forward reached layer {path!r} on the first batch, but not on batch {number + 1}: layers can be "
            "fitted in order only on batches that all take the same way through the model"
        )
        raise DataError(msg)

    @contextmanager
    def _settled(self, path: str, number: int) -> Iterator[None]:
        """Let the largest modules that end before ``path`` return what they returned before."""
        start = self._span[path][0]
        done = {p for p in self._single if self._span[p][1] < start}
        largest = {p for p in done if not any(a in done for a in _ancestors(p))}
        for key in [key for key in self._kept if key[0] not in largest]:
            self._bytes -= _size(self._kept.pop(key))
        with ExitStack() as stack:
            for name in largest:
                module = self._model.get_submodule(name)
                stack.enter_context(_stand_in(module, self._keeper(name, number, module.forward)))
            yield

    def _keeper(self, name: str, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def remembered(*args: Any, **kwargs: Any) -> Any:
            known = self._kept.get((name, number))
            if known is not None:
                return known.clone()  # an operation in place may follow
            versions = _versions((args, kwargs))
            output = forward(*args, **kwargs)
            if versions != _versions((args, kwargs)):
                return output  # it changed its input, for whoever uses that after it: it must run every time
            if isinstance(output, Tensor) and self._bytes + _size(output) <= self._limit:
                self._kept[name, number] = output.detach().clone()
                self._bytes += _size(output)
            return output

        return remembered

    def _once(self, path: str) -> bool:
        """Whether the module runs once, and nothing within it runs outside of it."""
        start, end = self._span[path]
        inner = [span for p, span in self._span.items() if p.startswith(f"{path}.")]
        return self.calls[path] == 1 and all(start < s and e < end for s, e in inner)

    def _record(self) -> None:
        """Run one batch, to see when each module starts and ends, and what follows what."""
        clock = iter(range(1 << 62))
        outputs: dict[int, tuple[str, Any]] = {}
        uses = _Uses()
        handles = []

        def entering(path: str) -> Callable[..., None]:
            def enter(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
                self.calls[path] += 1
                if self.calls[path] == 1:
                    self._span[path] = (next(clock), 0)
                first = next(tensors_in((args, kwargs)), None)
                if id(first) in outputs:
                    self._follows.setdefault(outputs[id(first)][0], path)

            return enter

        def leaving(path: str) -> Callable[..., None]:
            def leave(_module: nn.Module, _args: Any, output: Any) -> None:
                self._span[path] = (self._span[path][0], next(clock))
                if isinstance(output, Tensor) and id(output) not in outputs:
                    outputs[id(output)] = (path, output)  # held, so that its id stays its own
                    uses.of[id(output)] = 0

            return leave

        for path, module in self._model.named_modules():
            handles.append(module.register_forward_pre_hook(entering(path), with_kwargs=True))
            handles.append(module.register_forward_hook(leaving(path), prepend=True))
        try:
            with evaluating(self._model), layer_by_layer(), uses:
                self._forward(self._model, self._batches[0])
        finally:
            for handle in handles:
                handle.remove()
        self._single = {path for path in self._span if self._once(path)}
        alone = {path for key, (path, _) in outputs.items() if uses.of[key] == 1}
        alone = {path for path in alone if self.calls[path] == 1 == self.calls[self._follows.get(path, path)]}
        self._follows = {path: after for path, after in self._follows.items() if path in alone}


class _Uses(TorchDispatchMode):
    """Counts the operations that take each of the tensors whose ids are in ``of``."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.of: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for key in {id(t) for t in tensors_in((args, kwargs or {}))} & self.of.keys():
            self.of[key] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def _stand_in(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let ``forward`` run in place of the module's own."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


def _ancestors(path: str) -> Iterator[str]:
    parts = path.split(".")
    for n in range(1, len(parts)):
        yield ".".join(parts[:n])


def _versions(tree: Any) -> list[int]:
    """Return how often each of the tensors was changed in place, as far as torch counts it."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors_in(tree)]  # noqa: SLF001


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
