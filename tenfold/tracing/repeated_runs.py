"""Forwards of a model over batches that are the same ones however often they are repeated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import Any

from torch import nn

from tenfold.tracing.contexts import evaluating, layer_by_layer
from tenfold.tracing.decisions import Decisions, Imposed, Recorder
from tenfold.tracing.inputs import call_model, describe_inputs
from tenfold.tracing.memory import Memory
from tenfold.tracing.randomness import Randomness
from tenfold.tracing.side_effects import SideEffects
from tenfold.tracing.trace import Trace, Tracer, trace

Forward = Callable[[nn.Module, Any], object]


@dataclass(eq=False)
class Way:
    """What runs in which order on some of the batches.

    Attributes:
        trace: the record of the first of them.
        first: its number.
        readers: by module that may be left out, prefixes of the modules that take what it returns.
        leaves: when the modules without children start.
        before: the modules that may be left out before another one starts, the last first.
        lasting: modules whose outputs were still held at the end of a run of the first batch.
        written: modules to whose outputs something writes.
    """

    trace: Trace
    first: int
    readers: dict[str, list[str]] = field(default_factory=dict)
    leaves: list[int] = field(default_factory=list)
    before: dict[str, list[str]] = field(default_factory=dict)
    lasting: set[str] = field(default_factory=set)
    written: set[str] = field(default_factory=set)

    def once(self, path: str) -> bool:
        """Whether the module runs once, and nothing within it runs outside of it."""
        start, end = self.trace.spans[path]
        inner = [span for p, span in self.trace.spans.items() if p.startswith(f"{path}.")]
        return self.trace.calls[path] == 1 and all(start < s and e < end for s, e in inner)

    def done(self, path: str) -> list[str]:
        """Return the modules that return a tensor before ``path`` starts, the last first."""
        spans = self.trace.spans
        if path not in self.before:
            done = [name for name in self.readers if spans[name][1] < spans[path][0]]
            self.before[path] = sorted(done, key=lambda name: spans[name][1], reverse=True)
        return self.before[path]


class Runs:
    """Forwards of a model over batches, of which each draws, remembers and decides the same whenever it is repeated.

    It draws the same random numbers, starts from the buffers and attributes that the model has now, and takes the same
    decisions, where rows are selected by these. All of that is set back afterwards. Batches may differ in what runs on
    them.

    Args:
        model: may be changed between runs, layer by layer.
        batches: inputs as ``call_model`` takes them, on the device of the model.
        forward: runs the model on one batch; ``call_model`` by default.
        seed: of random numbers that forwards draw, other ones on every batch.
        like: the runs of another model of this structure, on the same batches: what it drew and decided is drawn and
            decided here.

    Attributes:
        model: as given.
        decisions: those of each batch.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        *,
        forward: Forward | None = None,
        seed: int = 0,
        like: Runs | None = None,
    ) -> None:
        self.model, self._batches, self._forward = model, batches, forward or call_model
        self._seed, self._like = seed, like
        self._randomness = Randomness(model, batches[0])
        self._draws: set[str] = set()  # modules that do
        self._leaves: set[str] = set()  # modules that leave something behind
        self._hidden = False  # where nobody sets it back if a forward does not come to its end
        self._remembers = False  # something from one forward to the next
        self._ways: list[Way] = []
        self._usual: dict[str, Way] = {}  # by inputs
        self.decisions: list[Decisions] = [] if like is None else like.decisions
        for number in range(len(batches)):
            self._ways.append(self._known_way(number) or self._follow(number))
        for way in self.ways:
            self._prepare(way)

    def _known_way(self, number: int) -> Way | None:
        """Return the way of a batch if it is that of another one for sure."""
        if self._like is not None:
            first = self._like.way(number).first
            return self._ways[first] if first < number else None
        known = self._usual.get(describe_inputs(self._batches[number]))
        if known is not None:
            self.decisions.append(Decisions())
        return known

    def _follow(self, number: int) -> Way:
        """Find out on which way a batch goes, and what modules do on it besides returning tensors."""
        batch, effects, memory = self._batches[number], SideEffects(self.model, self._randomness), Memory(self.model)
        deciding = Recorder() if self._like is None else Imposed(self.decisions[number])
        with self._randomness.seeded(self.seed_of(number)):
            found = trace(self.model, batch, forward=self._forward, watchers=(deciding, effects))
        changed, plain = memory.restore()
        self._remembers |= changed
        self._hidden |= effects.hidden
        self._draws |= effects.draws
        self._leaves |= effects.leaves | {outer for path in plain for outer in (path, *outside(path))}
        same = (way for way in self.ways if _flow(way.trace) == _flow(found))
        way = next(same, None) or Way(found, number)
        if isinstance(deciding, Recorder):
            self.decisions.append(deciding.decisions)
            if not (deciding.looked or deciding.decisions.made or effects.draws or effects.leaves or changed):
                self._usual[describe_inputs(batch)] = way
        return way

    def seed_of(self, number: int) -> int:
        """Return the seed of what is drawn on a batch."""
        return self._seed + number if self._like is None else self._like.seed_of(number)

    def way(self, number: int) -> Way:
        """Return the way of a batch."""
        return self._ways[number]

    def _prepare(self, way: Way) -> None:
        spans = way.trace.spans
        way.leaves = sorted(spans[path][0] for path in self.order if path in spans)
        single = {path for path in spans if way.once(path)} - self._leaves
        way.readers = {
            path: [f"{use.by}." for use in value.uses]
            for value in way.trace.values
            for path in value.makers
            if path in single
        }

    @property
    def ways(self) -> list[Way]:
        """The different ways of the batches, each once."""
        return list(dict.fromkeys(self._ways))

    def is_added(self, path: str) -> bool:
        """Return whether ``Trace.is_added`` holds on all batches that reach the module."""
        return all(trace.is_added(path) for trace in self._traces(path))

    def follower(self, path: str) -> str | None:
        """Return the ``Trace.follower`` of a module, if it is the same on all batches that reach it."""
        found = {trace.follower(path) for trace in self._traces(path)}
        return found.pop() if len(found) == 1 else None

    def _traces(self, path: str) -> list[Trace]:
        return [way.trace for way in self.ways if path in way.trace.spans]

    @property
    def order(self) -> tuple[str, ...]:
        """Paths of the modules without children that ran, each at its first call, of the first batch that ran it."""
        ran = dict.fromkeys(path for way in self.ways for path in way.trace.spans)
        leaves = [p for p in ran if p and not any(True for _ in self.model.get_submodule(p).children())]
        return tuple(sorted(leaves, key=self.start))

    def start(self, path: str) -> float:
        """Return when the module at ``path`` started, on a clock of its own; infinity if no batch reaches it."""
        return next((float(trace.spans[path][0]) for trace in self._traces(path)), inf)

    def places(self, path: str) -> list[int]:
        """Return the batches of which ``inputs`` and ``outputs`` yield a tensor, in order."""
        return [number for number, way in enumerate(self._ways) for _ in range(way.trace.calls[path])]

    @contextmanager
    def _same(self, number: int) -> Iterator[None]:
        """Let a forward of a batch be what the first one was, and leave nothing behind."""
        with ExitStack() as stack:
            if self._remembers:
                stack.callback(Memory(self.model).restore)
            stack.enter_context(evaluating(self.model))
            stack.enter_context(layer_by_layer())
            stack.enter_context(self._randomness.seeded(self.seed_of(number)))
            if self.decisions[number].made:
                followed = dict(self.model.named_modules())
                stack.enter_context(Tracer(followed, watchers=(Imposed(self.decisions[number]),)))
            yield


def outside(path: str) -> list[str]:
    """Return the paths of the modules around the one at ``path``, that of the model last.

    Example:
        >>> outside("a.b.c")
        ['a.b', 'a', '']
    """
    parts = path.split(".") if path else []
    return [".".join(parts[:depth]) for depth in reversed(range(len(parts)))]


def _flow(found: Trace) -> tuple[Any, ...]:
    """Return what tells the way of a batch from others."""
    return found.calls, found.spans, [(value.makers, value.uses) for value in found.values]
