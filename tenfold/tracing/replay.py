"""Run a model up to one of its layers, again and again, without computing anew what is settled before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from tenfold.errors import DataError
from tenfold.tracing.contexts import evaluating, layer_by_layer
from tenfold.tracing.inputs import call_model, tensors_in
from tenfold.tracing.trace import Tracer, trace

Forward = Callable[[nn.Module, Any], object]


class _Reached(BaseException):
    """Raised where the forward has come as far as was asked for; no error, so that nothing on the way catches it."""


class _Stop:
    """Ends a forward by a hook or a callback, and keeps the tensor that was seen there."""

    tensor: Tensor | None = None

    def __call__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()
        raise _Reached

    def at_input(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self(next(tensors_in((args, kwargs))))

    def at_output(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self(next(tensors_in(output)))


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
        self.trace = trace(model, batches[0], forward=self._forward)
        self._span = self.trace.spans
        self._single = {path for path in self._span if self._once(path)}

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

    def inputs(self, path: str) -> Iterator[Tensor]:
        """Iterate over the first input of the module at ``path``, batch by batch."""
        for number in range(len(self._batches)):
            module, stop = self._model.get_submodule(path), _Stop()
            yield self._run(path, number, stop, module.register_forward_pre_hook(stop.at_input, with_kwargs=True))

    def outputs(self, path: str) -> Iterator[Tensor]:
        """Iterate over the output of the module at ``path``, batch by batch."""
        for number in range(len(self._batches)):
            module, stop = self._model.get_submodule(path), _Stop()
            yield self._run(path, number, stop, module.register_forward_hook(stop.at_output, prepend=True))

    def branches(self, path: str, last: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Iterate over first input and output of the layer at ``path``, and the shortcut its branch is added to.

        Args:
            path: the layer.
            last: the module at the end of its branch, itself or one after it; ``trace.is_added`` must hold for it.
        """
        seen: dict[str, Tensor] = {}

        def enter(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            seen["input"] = next(tensors_in((args, kwargs))).detach().clone()  # an operation in place may follow

        def leave(_module: nn.Module, _args: Any, output: Any) -> None:
            seen["output"] = next(tensors_in(output)).detach().clone()  # a hook of the layer may change it

        for number in range(len(self._batches)):
            layer, end, stop = self._model.get_submodule(path), self._model.get_submodule(last), _Stop()
            shortcut = self._run(
                path,
                number,
                stop,
                layer.register_forward_pre_hook(enter, with_kwargs=True),
                layer.register_forward_hook(leave, prepend=True),
                Tracer({last: end}, on_addition=stop),
            )
            yield seen["input"], seen["output"], shortcut

    def _run(self, path: str, number: int, stop: _Stop, *watching: AbstractContextManager[Any]) -> Tensor:
        """Run one batch until ``stop`` is called, with the hooks in ``watching``, which are removed again."""
        with ExitStack() as stack:
            for context in watching:
                stack.enter_context(context)
            try:
                with evaluating(self._model), layer_by_layer(), self._settled(path, number):
                    self._forward(self._model, self._batches[number])
            except (_Reached, Exception):  # scripted code turns whatever is raised within it into an error of its own
                if stop.tensor is None:
                    raise
        if stop.tensor is not None:
            return stop.tensor
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
        return self.trace.calls[path] == 1 and all(start < s and e < end for s, e in inner)


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
