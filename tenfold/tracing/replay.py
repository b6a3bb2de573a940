"""Repeated forwards up to one layer of a model, without recomputing what is settled before it."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.errors import DataError
from tenfold.tensors import version_of
from tenfold.tracing.contexts import evaluating, layer_by_layer
from tenfold.tracing.inputs import call_model, tensors_in
from tenfold.tracing.trace import Tracer, trace

Forward = Callable[[nn.Module, Any], object]

_FEW = 4  # layers that are computed again rather than their output kept beyond ``spare``

_BLOCK_BYTES = 40 << 20  # of outputs in one block: above the 32 MiB from which glibc maps every block by itself
_ALIGNED = 16  # elements


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

    Of these outputs only those are held that something still to run reads: in a residual network those at one depth,
    not those of all blocks. Modules that only such modules read return a hollow tensor of the right shape. What at most
    four layers compute from an output in memory is held only while all outputs together take at most ``spare`` bytes.

    Hooks of a layer stay with it, whatever takes its place: what is seen is what its forward takes and returns, after
    the hooks that change its inputs and before those that change its output.

    The model runs in evaluation mode, and no batch may change what runs in which order. Layers must be asked for in the
    order of ``order``: what lies before must not change any more.

    Args:
        model: may be changed between calls, layer by layer.
        batches: inputs as ``call_model`` takes them, on the device of the model.
        forward: runs the model on one batch; ``call_model`` by default.
        limit: bytes of outputs to keep; beyond that things are computed again.
        spare: bytes up to which outputs are kept that a few layers could compute again.
        changing: whether the caller may change a layer once it is read. If not, what was read is kept as well.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> replay = Replay(model, [torch.ones(4, 3)])
        >>> replay.order
        ('0', '1', '2')
        >>> [x.shape for x in replay.inputs("2")]
        [torch.Size([4, 3])]
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        *,
        forward: Forward | None = None,
        limit: int = 4 << 30,
        spare: int = 128 << 20,
        changing: bool = True,
    ) -> None:
        self._model, self._batches, self._forward = model, batches, forward or call_model
        self._limit, self._spare, self._changing = limit, spare, changing
        self._kept: dict[int, dict[str, Tensor]] = defaultdict(dict)  # outputs by batch and path
        self._hollow: dict[int, dict[str, Tensor]] = defaultdict(dict)
        self._hollows: dict[tuple[torch.Size, torch.dtype, torch.device], Tensor] = {}
        self._bytes = 0
        self._rooms: dict[str, Tensor] = {}
        self._lasting: set[str] = set()
        self.trace = trace(model, batches[0], forward=self._forward)
        self._span = self.trace.spans
        self._leaves = sorted(self._span[path][0] for path in self.order)
        self._single = {path for path in self._span if self._once(path)}
        self._readers = {
            path: [f"{use.by}." for use in value.uses]
            for value in self.trace.values
            for path in value.makers
            if path in self._single
        }
        self._before: dict[str, list[str]] = {}
        self._handed: dict[str, Tensor] = {}
        self._written: set[str] = set()

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
            output = self._run(path, number, stop, module.register_forward_hook(stop.at_output, prepend=True))
            self._keep_read(path, number, output)
            yield output

    def branches(
        self, path: str, last: str, instead: Iterable[Tensor] | None = None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Iterate over first input and output of the layer at ``path``, and the shortcut its branch is added to.

        Args:
            path: the layer.
            last: the module at the end of its branch, itself or the one after it; ``trace.is_added`` must hold for it.
            instead: for each batch a tensor in the shape of the output; then neither of the two runs, and outputs are
                hollow. Use it where only inputs and shortcuts are wanted.
        """
        shapes = None if instead is None else iter(instead)
        seen: dict[str, Tensor] = {}

        def enter(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            seen["input"] = next(tensors_in((args, kwargs))).detach().clone()  # an operation in place may follow

        def leave(_module: nn.Module, _args: Any, output: Any) -> None:
            tensor = next(tensors_in(output))
            self._keep_read(path, number, tensor)
            held = self._kept[number].get(path) if self._holds(path) else None
            seen["output"] = tensor.detach().clone() if held is None else held  # a hook of the layer may change it

        for number in range(len(self._batches)):
            layer, end, stop = self._model.get_submodule(path), self._model.get_submodule(last), _Stop()
            taking = layer.register_forward_pre_hook(enter, with_kwargs=True)
            watching: list[AbstractContextManager[Any]] = [taking, Tracer({last: end}, on_addition=stop)]
            if shapes is None:
                watching.insert(1, layer.register_forward_hook(leave, prepend=True))
            else:
                seen["output"] = self._hollowed(next(shapes))
                watching += [_stand_in(module, lambda *_, **__: seen["output"]) for module in {layer, end}]
            shortcut = self._run(path, number, stop, *watching)
            yield seen["input"], seen["output"], shortcut

    def _run(self, path: str, number: int, stop: _Stop, *watching: AbstractContextManager[Any]) -> Tensor:
        """Run one batch until ``stop`` is called, with the hooks in ``watching``, which are removed again."""
        with ExitStack() as stack:
            for context in watching:
                stack.enter_context(context)
            before = set(self._kept[number])
            try:
                with evaluating(self._model), layer_by_layer(), self._settled(path, number):
                    self._forward(self._model, self._batches[number])
            except (_Reached, Exception):  # scripted code turns whatever is raised within it into an error of its own
                if stop.tensor is None:
                    raise
        self._written |= {name for name, tensor in self._handed.items() if version_of(tensor) != 0}
        self._handed.clear()
        self._standing(path, number)  # what was kept on the way has made other outputs dispensable
        if number == 0:
            self._lasting = set(self._kept[0]) - before
        if number == len(self._batches) - 1:
            self._rooms.clear()
        if stop.tensor is not None:
            return stop.tensor
        msg = (
            f"the forward reached layer {path!r} on the first batch, but not on batch {number + 1}: layers can be "
            "fitted in order only on batches that all take the same way through the model"
        )
        raise DataError(msg)

    @contextmanager
    def _settled(self, path: str, number: int) -> Iterator[None]:
        """Let modules that end before ``path`` return what they returned before."""
        with ExitStack() as stack:
            for name, known in self._standing(path, number).items():
                module = self._model.get_submodule(name)
                stack.enter_context(_stand_in(module, self._keeper(name, number, known, module.forward)))
            yield

    def _standing(self, path: str, number: int) -> dict[str, Tensor | None]:
        """Return what modules before ``path`` are to return instead of running; None if they run and it may be kept.

        Outputs that nothing reads any more are forgotten.
        """
        kept, hollow = self._kept[number], self._hollow[number]
        result: dict[str, Tensor | None] = {}
        idle: tuple[str, ...] = ()  # prefixes of what does not run
        whole: tuple[str, ...] = ()  # prefixes of what runs and may be kept as a whole
        for name in self._done(path):  # the last first: whether the readers of an output run is known by then
            if name.startswith(idle):
                self._forget(name, number)
                continue
            read = any(not reader.startswith(idle) for reader in self._readers[name])
            if name in kept and not read:
                hollow[name] = self._hollowed(kept[name])
                self._forget(name, number)
            known = kept.get(name) if read else hollow.get(name)
            if known is not None:
                idle += (f"{name}.",)
                result[name] = known
            elif not name.startswith(whole):
                result[name] = None
                if name not in hollow:  # else it changes its input in place, and cannot be kept
                    whole += (f"{name}.",)
        return result

    def _done(self, path: str) -> list[str]:
        """Return the modules that return a tensor before ``path`` starts, the last first."""
        if path not in self._before:
            done = [name for name in self._readers if self._span[name][1] < self._span[path][0]]
            self._before[path] = sorted(done, key=lambda name: self._span[name][1], reverse=True)
        return self._before[path]

    def _keeper(self, name: str, number: int, known: Tensor | None, forward: Callable[..., Any]) -> Callable[..., Any]:
        hollow = name not in self._kept[number]

        def remembered(*args: Any, **kwargs: Any) -> Any:
            if known is not None:
                return known if hollow else self._hand_out(name, number, known)
            before = _versions((args, kwargs))
            output = forward(*args, **kwargs)
            after = _versions((args, kwargs))
            changed = [key for key in before if before[key] != after.get(key)]
            if changed == [id(output)]:  # others may read the input that it changed: it runs whenever one of them does
                self._hollow[number][name] = self._hollowed(output)
            elif not changed and isinstance(output, Tensor) and (number == 0 or name in self._lasting):
                self._keep(name, number, output)  # of the first batch all, to see which are still wanted at the end
            return output

        return remembered

    def _hand_out(self, name: str, number: int, known: Tensor) -> Tensor:
        """Return what is held, or a copy of it if an operation in place follows."""
        # Every batch goes the way of the first, on which it is seen what is written to on the way to a layer.
        if number > 0 and name not in self._written:
            return known.detach()
        copied = known.clone()
        if number == 0:
            self._handed[name] = copied
        return copied

    def _holds(self, path: str) -> bool:
        """Whether the output of a layer is kept once it was read: not that of the last layer, which nothing follows."""
        return not self._changing and path in self._readers and max(self._leaves, default=0) > self._span[path][1]

    def _keep_read(self, path: str, number: int, output: Tensor) -> None:
        if self._holds(path):
            self._keep(path, number, output)

    def _keep(self, name: str, number: int, output: Tensor) -> None:
        """Hold the output of a module if there is room for it, in place of what was held of the modules within."""
        kept, (start, end) = self._kept[number], self._span[name]
        ends = (self._span[other][1] for other in kept)
        nearest = max((other for other in ends if other < start), default=-1)
        few = bisect_left(self._leaves, end) - bisect_left(self._leaves, nearest) <= _FEW
        limit = min(self._limit, self._spare) if few else self._limit
        if name not in kept and self._bytes + _size(output) <= limit:
            kept[name] = self._stored(name, number, output)
            self._bytes += _size(output)
            for other in [other for other in kept if other.startswith(f"{name}.")]:
                self._forget(other, number)

    def _stored(self, name: str, number: int, output: Tensor) -> Tensor:
        """Return a copy of an output, in one block of memory with those of the next batches."""
        # The allocator maps large blocks one by one and gives each back once it is free. Single outputs would lie among
        # what forwards allocate in between, and leave holes as large as all of them.
        size = -(-output.numel() // _ALIGNED) * _ALIGNED
        room = self._rooms.get(name)
        if room is None or len(room) < size or room.dtype != output.dtype:
            most = max(1, min(_BLOCK_BYTES // (size * output.element_size() or 1), len(self._batches) - number))
            room = output.new_empty(most * size)
        self._rooms[name] = room[size:]
        strides = torch.empty_like(output, device="meta").stride()
        return room[:size].as_strided(output.shape, strides).copy_(output.detach())

    def _hollowed(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the same shape that takes the memory of one element. NaN tells if something reads it."""
        # One for all batches: small blocks that stay cut the free memory between them into pieces of little use.
        key = (tensor.shape, tensor.dtype, tensor.device)
        if key not in self._hollows:
            value = torch.nan if tensor.is_floating_point() else 0
            one = torch.full((1,), value, dtype=tensor.dtype, device=tensor.device)
            self._hollows[key] = one.expand(tensor.shape)
        return self._hollows[key]

    def _forget(self, name: str, number: int) -> None:
        if name in self._kept[number]:
            self._bytes -= _size(self._kept[number].pop(name))

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


def _versions(tree: Any) -> dict[int, int | None]:
    """Return how often each of the tensors was changed in place, by id, as far as torch counts it."""
    return {id(tensor): version_of(tensor) for tensor in tensors_in(tree)}


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
