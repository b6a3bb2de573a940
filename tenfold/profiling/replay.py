"""Run a model up to one of its layers, again and again, without computing anew what is settled before it."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tenfold.errors import DataError
from tenfold.profiling.inputs import call_model, tensors_in
from tenfold.profiling.modes import evaluating, layer_by_layer

Forward = Callable[[nn.Module, Any], object]

# Outputs that a few modules compute from others in memory are held only within this many bytes.
SPARE = 128 << 20
_FEW = 4


class _Reached(BaseException):
    """Raised where the forward has come as far as was asked for; no error, so that nothing on the way catches it."""


class Replay:
    """Inputs and outputs of layers in the order in which they run, for callers that change the layers on the way.

    What ran before the layer asked for and was not changed since is taken from memory: the outputs of the largest
    modules that end before it. So a model of L layers costs about L times one layer, not L²/2.

    Of these outputs only those are held that something still to run reads: at a residual network those at one depth,
    not those of all blocks. Whatever read the others is itself taken from memory, and is handed a hollow tensor of the
    right shape. What no more than four modules compute from others in memory is held only while all outputs together
    stay within ``spare`` bytes; beyond that it is computed again each time.

    Hooks of a layer stay with it, whatever takes its place: what is seen is what its forward takes and returns, after
    the hooks that change its inputs and before those that change its output.

    The model runs in evaluation mode, and no batch may change what runs in which order. Layers must be asked for in the
    order of ``order``: what lies before must not change any more.

    Args:
        model: may be changed between calls, layer by layer.
        batches: inputs as ``call_model`` takes them, on the device of the model.
        forward: runs the model on one batch; ``call_model`` by default.
        limit: bytes of outputs to keep; beyond that things are computed again.
        spare: bytes within which outputs are kept that are cheap to compute again.
        changing: whether the caller may change a layer after having read it. If not, what ``outputs`` computes is kept.

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
        spare: int = SPARE,
        changing: bool = True,
    ) -> None:
        self._model, self._batches, self._forward = model, batches, forward or call_model
        self._limit, self._spare, self._changing = limit, spare, changing
        self._kept: dict[int, dict[str, Tensor]] = defaultdict(dict)
        self._hollow: dict[int, dict[str, Tensor]] = defaultdict(dict)
        self._bytes = 0
        self.calls: Counter[str] = Counter()
        self._span: dict[str, tuple[int, int]] = {}
        self._follows: dict[str, str] = {}
        self._single: set[str] = set()
        self._reads: dict[str, list[int]] = {}
        self._stable: set[str] = set()
        self._in_place: set[str] = set()
        self._leaves: list[int] = []
        self._before: dict[str, list[str]] = {}
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
            output = self._run(path, number, module.register_forward_hook(leave, prepend=True))
            self._keep_read(path, number, output)
            yield output

    def _keep_read(self, path: str, number: int, output: Tensor) -> None:
        """Keep what a caller read, where nothing changes it any more."""
        if not self._changing and path in self._reads and path in self._single:
            self._keep(path, number, output)

    def _run(self, path: str, number: int, handle: Any) -> Tensor:
        try:
            with evaluating(self._model), layer_by_layer(), self._settled(path, number):
                self._forward(self._model, self._batches[number])
        except _Reached as reached:
            found: Tensor = reached.args[0]
            return found
        finally:
            handle.remove()
            self._standing(path, number)  # what was kept on the way has made others dispensable
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

        Forget what nothing that runs will read.
        """
        kept, hollow = self._kept[number], self._hollow[number]
        result: dict[str, Tensor | None] = {}
        off: list[tuple[int, int]] = []  # when modules run that now do not
        skipped: tuple[str, ...] = ()  # what lies within them
        running: tuple[str, ...] = ()  # what lies within those that run and are kept as a whole
        for name in self._done(path):  # the last first: who reads an output is known before who makes it
            if name.startswith(skipped):
                self._forget(name, number)
                continue
            read = any(not any(start < time < end for start, end in off) for time in self._reads[name])
            if not read and name in kept:
                hollow[name] = _hollow(kept[name])
                self._forget(name, number)
            known = kept.get(name) if read else hollow.get(name)
            if known is not None:
                skipped += (f"{name}.",)
                off.append(self._span[name])
            if known is not None or not name.startswith(running):
                result[name] = known
            if known is None and name not in self._in_place:
                running += (f"{name}.",)
        return result

    def _done(self, path: str) -> list[str]:
        """Return the modules that end before ``path`` and whose work can be left out, the last first."""
        if path not in self._before:
            start = self._span[path][0]
            done = [p for p in self._single if self._span[p][1] < start and p in self._reads]
            self._before[path] = sorted(done, key=lambda p: self._span[p][1], reverse=True)
        return self._before[path]

    def _keeper(
        self, name: str, number: int, known: Tensor | None, forward: Callable[..., Any]
    ) -> Callable[..., Any]:
        def remembered(*args: Any, **kwargs: Any) -> Any:
            if known is not None:
                return known if name in self._stable else known.clone()  # an operation in place may follow
            output: Tensor = forward(*args, **kwargs)
            self._keep(name, number, output)
            return output

        return remembered

    def _keep(self, name: str, number: int, output: Tensor) -> None:
        """Hold the output of a module, if it may be and is worth its bytes."""
        kept = self._kept[number]
        if name in self._in_place:
            self._hollow[number][name] = _hollow(output)  # it changes what others read, and runs whenever they do
            return
        start, end = self._span[name]
        nearest = max((last for last in (self._span[other][1] for other in kept) if last < start), default=-1)
        few = bisect_left(self._leaves, end) - bisect_left(self._leaves, nearest) <= _FEW
        size = _size(output)
        if name in kept or self._bytes + size > (min(self._limit, self._spare) if few else self._limit):
            return
        alone = name in self._stable and output.untyped_storage().nbytes() <= size
        kept[name] = output.detach() if alone else output.detach().clone()
        self._bytes += size
        for other in [other for other in kept if other.startswith(f"{name}.")]:
            self._forget(other, number)

    def _forget(self, name: str, number: int) -> None:
        if name in self._kept[number]:
            self._bytes -= _size(self._kept[number].pop(name))

    def _once(self, path: str) -> bool:
        """Whether the module runs once, and nothing within it runs outside of it."""
        start, end = self._span[path]
        inner = [span for p, span in self._span.items() if p.startswith(f"{path}.")]
        return self.calls[path] == 1 and all(start < s and e < end for s, e in inner)

    def _record(self) -> None:
        """Run one batch, to see when each module starts and ends, what follows what, and when outputs are read."""
        clock = iter(range(1 << 62))
        outputs: dict[int, tuple[str, Tensor]] = {}
        made: dict[str, tuple[int, int]] = {}  # the output of a module: its id, and how often it was changed by then
        taken: dict[str, dict[int, int]] = {}
        uses = _Uses(clock)
        handles = []

        def entering(path: str) -> Callable[..., None]:
            def enter(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
                self.calls[path] += 1
                if self.calls[path] == 1:
                    self._span[path] = (next(clock), 0)
                taken[path] = _versions((args, kwargs))
                first = next(tensors_in((args, kwargs)), None)
                if id(first) in outputs:
                    self._follows.setdefault(outputs[id(first)][0], path)

            return enter

        def leaving(path: str) -> Callable[..., None]:
            def leave(_module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
                self._span[path] = (self._span[path][0], next(clock))
                if not isinstance(output, Tensor):
                    return
                if id(output) not in outputs:
                    outputs[id(output)] = (path, output)  # held, so that its id stays its own
                    uses.of[id(output)] = []
                versions = _versions((args, kwargs))
                changed = [key for key, version in taken[path].items() if versions.get(key) != version]
                if changed in ([], [id(output)]):  # else it must run: others use the input that it changed
                    made[path] = (id(output), _version(output))
                    self._in_place.update([path] if changed else [])

            return leave

        for path, module in self._model.named_modules():
            handles.append(module.register_forward_pre_hook(entering(path), with_kwargs=True))
            handles.append(module.register_forward_hook(leaving(path), prepend=True, with_kwargs=True))
        try:
            with evaluating(self._model), layer_by_layer(), uses:
                self._forward(self._model, self._batches[0])
        finally:
            for handle in handles:
                handle.remove()
        self._single = {path for path in self._span if self._once(path)}
        self._leaves = sorted(self._span[path][0] for path in self.order)
        self._reads = {path: [t for t, now in uses.of[key] if now == then] for path, (key, then) in made.items()}
        self._stable = {path for path, (key, then) in made.items() if _version(outputs[key][1]) == then}
        alone = {path for key, (path, _) in outputs.items() if len(uses.of[key]) == 1}
        alone = {path for path in alone if self.calls[path] == 1 == self.calls[self._follows.get(path, path)]}
        self._follows = {path: after for path, after in self._follows.items() if path in alone}


class _Uses(TorchDispatchMode):
    """Notes when operations take each of the tensors whose ids are in ``of``, and how often it was changed by then."""

    def __init__(self, clock: Iterator[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.of: dict[int, list[tuple[int, int]]] = {}
        self._clock = clock

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in {id(t): t for t in tensors_in((args, kwargs or {})) if id(t) in self.of}.values():
            self.of[id(tensor)].append((next(self._clock), _version(tensor)))
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


def _hollow(tensor: Tensor) -> Tensor:
    """Return a tensor of the same shape that has one element: nothing reads it, so NaN tells if something does."""
    value = torch.full((1,), torch.nan if tensor.is_floating_point() else 0, dtype=tensor.dtype, device=tensor.device)
    return value.expand(tensor.shape)


def _versions(tree: Any) -> dict[int, int]:
    """Return how often each of the tensors was changed in place, by id, as far as torch counts it."""
    return {id(tensor): _version(tensor) for tensor in tensors_in(tree)}


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # noqa: SLF001


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
