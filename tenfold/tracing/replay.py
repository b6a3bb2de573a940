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
from tenfold.tensors import untransformed, version_of
from tenfold.tracing.block_calls import BlockCall
from tenfold.tracing.inputs import map_tensors, tensors_in
from tenfold.tracing.randomness import State
from tenfold.tracing.repeated_runs import Forward, Runs
from tenfold.tracing.trace import Tracer

_FEW = 4  # layers that are computed again rather than their output kept beyond ``spare``

_BLOCK_BYTES = 40 << 20  # of outputs in one block: above the 32 MiB from which glibc maps every block by itself
_ALIGNED = 16  # elements


class _Reached(BaseException):
    """Raised where the forward has come as far as was asked for; no error, so that nothing on the way catches it."""


class _Stop:
    """Keeps what is seen at each call of a module, by a hook or a callback, and ends the forward after the last.

    Args:
        calls: how many there are.
        ending: whether the forward ends there, or goes on to its end.
    """

    def __init__(self, calls: int = 1, *, ending: bool = True) -> None:
        self.seen: list[Tensor] = []
        self.calls: list[BlockCall] = []
        self._calls, self._ending = calls, ending

    @property
    def done(self) -> bool:
        """Whether all calls were seen."""
        return len(self.seen) >= self._calls

    def __call__(self, tensor: Tensor) -> None:
        if self.done:
            return
        ending, tensor = self._ending and len(self.seen) + 1 == self._calls, untransformed(tensor)
        self.seen.append(tensor.detach() if ending else tensor.detach().clone())  # an operation in place may follow
        if ending:
            raise _Reached

    def at_input(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self(next(tensors_in((args, kwargs))))

    def at_call(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.calls.append(BlockCall(*map_tensors((args, kwargs), Tensor.detach if self._ending else Tensor.clone)))
        self.at_input(module, args, kwargs)

    def at_output(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self(next(tensors_in(output)))


class Replay(Runs):
    """Inputs and outputs of layers in the order in which they run, for callers that change the layers on the way.

    What ran before the layer asked for and was not changed since is taken from memory: the outputs of the largest
    modules that end before it. So a model of L layers costs about L times one layer, not L²/2.

    Of these outputs only those are held that something still to run reads: in a residual network those at one depth,
    not those of all blocks. Modules that only such modules read return a hollow tensor of the right shape. What at most
    four layers compute from an output in memory is held only while all outputs together take at most ``spare`` bytes.

    Hooks of a layer stay with it, whatever takes its place: what is seen is what its forward takes and returns, after
    the hooks that change its inputs and before those that change its output.

    All forwards of a batch are the same one, see ``Runs``. Modules that leave something behind besides what they return
    (a feature map in an attribute, or in a list that hooks fill) always run.

    The model runs in evaluation mode. Layers must be asked for in the order of ``order``: what lies before must not
    change any more.

    Args:
        model: may be changed between calls, layer by layer.
        batches: inputs as ``call_model`` takes them, on the device of the model.
        forward: runs the model on one batch; ``call_model`` by default.
        limit: bytes of outputs to keep; beyond that things are computed again.
        spare: bytes up to which outputs are kept that a few layers could compute again.
        changing: whether the caller may change a layer once it is read. If not, what was read is kept as well.
        seed: of random numbers that forwards draw, other ones on every batch.
        like: the replay of another model of this structure, on the same batches: what it drew and decided is drawn and
            decided here.

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
        seed: int = 0,
        like: Runs | None = None,
    ) -> None:
        super().__init__(model, batches, forward=forward, seed=seed, like=like)
        self._limit, self._spare, self._changing = limit, spare, changing
        self._kept: dict[int, dict[str, Tensor]] = defaultdict(dict)  # outputs by batch and path
        self._hollow: dict[int, dict[str, Tensor]] = defaultdict(dict)
        self._after: dict[int, dict[str, State]] = defaultdict(dict)  # where modules that draw left the generators
        self._hollows: dict[tuple[torch.Size, torch.dtype, torch.device], Tensor] = {}
        self._bytes = 0
        self._rooms: dict[str, Tensor] = {}
        self._handed: dict[str, Tensor] = {}

    def inputs(self, path: str) -> Iterator[Tensor]:
        """Iterate over the first input of the module at ``path``, batch by batch, call by call."""
        for number in self._reaching(path):
            module, stop = self.model.get_submodule(path), self._stop(path, number)
            self._run(path, number, stop, module.register_forward_pre_hook(stop.at_input, with_kwargs=True))
            yield from stop.seen

    def calls(self, path: str, number: int | None = None) -> Iterator[BlockCall]:
        """Iterate over how the module at ``path`` is called, which is once a forward; on one of the batches or all."""
        for each in self._reaching(path, number):
            stop = self._stop(path, each)
            hook = self.model.get_submodule(path).register_forward_pre_hook(stop.at_call, with_kwargs=True)
            self._run(path, each, stop, hook)
            yield stop.calls[0]

    def outputs(self, path: str, only: int | None = None) -> Iterator[Tensor]:
        """Iterate over the output of the module at ``path``, batch by batch, call by call; on one batch or all."""
        for number in self._reaching(path, only):
            module, stop = self.model.get_submodule(path), self._stop(path, number)
            self._run(path, number, stop, module.register_forward_hook(stop.at_output, prepend=True))
            self._keep_read(path, number, stop.seen[0])
            yield from stop.seen

    def _reaching(self, path: str, only: int | None = None) -> Iterator[int]:
        yield from dict.fromkeys(self.places(path)) if only is None else (only,)
        self._rooms.clear()

    def _stop(self, path: str, number: int) -> _Stop:
        return _Stop(self.way(number).trace.calls[path], ending=not self._hidden)

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

        for number in self._reaching(path):
            layer, end = self.model.get_submodule(path), self.model.get_submodule(last)
            stop = _Stop(ending=not self._hidden)
            taking = layer.register_forward_pre_hook(enter, with_kwargs=True)
            watching: list[AbstractContextManager[Any]] = [taking, Tracer({last: end}, on_addition=stop)]
            if shapes is None:
                watching.insert(1, layer.register_forward_hook(leave, prepend=True))
            else:
                seen["output"] = self._hollowed(next(shapes))
                watching += [stand_in(module, lambda *_, **__: seen["output"]) for module in {layer, end}]
            self._run(path, number, stop, *watching)
            yield seen["input"], seen["output"], stop.seen[0]

    def _run(self, path: str, number: int, stop: _Stop, *watching: AbstractContextManager[Any]) -> None:
        """Run one batch until ``stop`` is done, with the hooks in ``watching``, which are removed again."""
        way, kept = self.way(number), self._kept[number]
        if self._changing:  # the layer may have changed since, on another batch that reached it sooner
            for name in [name for name in kept if way.trace.spans[name][1] > way.trace.spans[path][0]]:
                self._forget(name, number)
        with ExitStack() as stack:
            stack.enter_context(self._same(number))
            for context in watching:
                stack.enter_context(context)
            before = set(kept)
            try:
                with self._settled(path, number):
                    self._forward(self.model, self._batches[number])
            except (_Reached, Exception):  # scripted code turns whatever is raised within it into an error of its own
                if not stop.done:
                    raise
        way.written |= {name for name, tensor in self._handed.items() if version_of(tensor) != 0}
        self._handed.clear()
        self._standing(path, number)  # what was kept on the way has made other outputs dispensable
        if number == way.first:
            way.lasting = set(kept) - before
        if not stop.done:
            msg = (
                f"batch {number + 1} reached layer {path!r} before, and does not now: layers can be fitted in order "
                "only on batches that take the same way through both models"
            )
            raise DataError(msg)

    @contextmanager
    def _settled(self, path: str, number: int) -> Iterator[None]:
        """Let modules that end before ``path`` return what they returned before."""
        with ExitStack() as stack:
            for name, known in self._standing(path, number).items():
                module = self.model.get_submodule(name)
                stack.enter_context(stand_in(module, self._keeper(name, number, known, module.forward)))
            yield

    def _standing(self, path: str, number: int) -> dict[str, Tensor | None]:
        """Return what modules before ``path`` are to return instead of running; None if they run and it may be kept.

        Outputs that nothing reads any more are forgotten.
        """
        kept, hollow = self._kept[number], self._hollow[number]
        result: dict[str, Tensor | None] = {}
        idle: tuple[str, ...] = ()  # prefixes of what does not run
        whole: tuple[str, ...] = ()  # prefixes of what runs and may be kept as a whole
        way = self.way(number)
        for name in way.done(path):  # the last first: whether the readers of an output run is known by then
            if name.startswith(idle):
                self._forget(name, number)
                continue
            read = any(not reader.startswith(idle) for reader in way.readers[name])
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

    def _keeper(self, name: str, number: int, known: Tensor | None, forward: Callable[..., Any]) -> Callable[..., Any]:
        hollow, way, draws = name not in self._kept[number], self.way(number), name in self._draws

        def remembered(*args: Any, **kwargs: Any) -> Any:
            if known is not None:
                if draws:
                    self._randomness.set(self._after[number][name])
                return known if hollow else self._hand_out(name, number, known)
            before = _versions((args, kwargs))
            output = forward(*args, **kwargs)
            if draws:
                self._after[number][name] = self._randomness.state()
            after = _versions((args, kwargs))
            changed = [key for key in before if before[key] != after.get(key)]
            if changed == [id(output)]:  # others may read the input that it changed: it runs whenever one of them does
                self._hollow[number][name] = self._hollowed(output)
            elif not changed and isinstance(output, Tensor) and (number == way.first or name in way.lasting):
                self._keep(name, number, output)  # of the first all, to see which are still wanted at the end
            return output

        return remembered

    def _hand_out(self, name: str, number: int, known: Tensor) -> Tensor:
        """Return what is held, or a copy of it if an operation in place follows."""
        # On the first batch of a way it is seen what is written to on the way to a layer.
        way = self.way(number)
        if number != way.first and name not in way.written:
            return known.detach()
        copied = known.clone()
        if number == way.first:
            self._handed[name] = copied
        return copied

    def _holds(self, path: str) -> bool:
        """Whether the output of a layer is kept once it was read: not that of the last layer, which nothing follows."""
        ways = [way for way in self.ways if path in way.trace.spans]
        readable = not self._changing and path not in self._draws and all(path in way.readers for way in ways)
        return readable and any(max(way.trace.spans.values())[0] > way.trace.spans[path][1] for way in ways)

    def _keep_read(self, path: str, number: int, output: Tensor) -> None:
        if self._holds(path):
            self._keep(path, number, output)

    def _keep(self, name: str, number: int, output: Tensor) -> None:
        """Hold the output of a module if there is room for it, in place of what was held of the modules within."""
        way, kept = self.way(number), self._kept[number]
        start, end = way.trace.spans[name]
        ends = (way.trace.spans[other][1] for other in kept)
        nearest = max((other for other in ends if other < start), default=-1)
        few = bisect_left(way.leaves, end) - bisect_left(way.leaves, nearest) <= _FEW
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


@contextmanager
def stand_in(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
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
