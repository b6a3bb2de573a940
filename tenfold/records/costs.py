"""What a model costs: per layer and in total."""

from __future__ import annotations

from math import prod
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from tenfold.records.base import Record
from tenfold.records.geometry import LayerSpec, Shape
from tenfold.records.units import Unit

SCHEMA_VERSION = 1

_WIDE = 4.0  # the upper bound of a speedup by the lower one: what is wider says nothing

Clock = Literal["wall", "processor"]


class Cost(Record):
    """Parameters and multiply-accumulates (1 MAC = 2 FLOPs)."""

    params: NonNegativeInt = 0
    macs: NonNegativeInt = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(params=self.params + other.params, macs=self.macs + other.macs)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(params=self.params - other.params, macs=self.macs - other.macs)

    def below(self, other: Cost) -> bool:
        """Whether nothing here is larger than in ``other`` and something is smaller.

        What has no MACs at all, a lookup in an embedding, is judged by its parameters.
        """
        macs = self.macs if other.macs else 0
        smaller = self.params < other.params or macs < other.macs
        return self.params <= other.params and macs <= other.macs and smaller


class Latency(Record):
    """Measured milliseconds, and everything they depend on.

    ``low_ms`` and ``high_ms`` are the quartiles of the ``runs`` measurements around the median. ``tf32`` tells whether
    float32 products may have been rounded to TF32, which only some accelerators do; ``runtime`` is what ran it.
    ``load`` says in words what else the machine did. ``clock`` is "wall", or "processor" where that took too much of
    the time on the wall: then only the time counts in which the model had a processor.
    """

    median_ms: NonNegativeFloat
    low_ms: NonNegativeFloat
    high_ms: NonNegativeFloat
    runs: int
    batch_size: int | None = None
    threads: int
    device: str
    dtype: str
    memory_format: str = "contiguous"
    tf32: bool = False
    runtime: str = "torch"
    clock: Clock = "wall"
    load: str = ""


class Speedup(Record):
    """How many times faster one model is than another, measured in turns.

    ``ratio`` is the median over ``rounds`` of (time of the other / time of this one); ``low`` and ``high`` bound the
    true median with a probability of at least ``confidence``. ``clock`` is that of ``Latency``. Where ``doubt`` says
    why, the interval is too wide for a factor to be claimed, and ``ratio`` is no more than a guess within it.
    """

    ratio: NonNegativeFloat
    low: NonNegativeFloat
    high: NonNegativeFloat
    rounds: int
    confidence: float = 0.95
    clock: Clock = "wall"
    doubt: str = ""

    @property
    def in_doubt(self) -> str:
        """What to say where no factor can be claimed: its bounds, if they say anything; empty where one can.

        Example:
            >>> Speedup(ratio=2, low=1.2, high=2.9, rounds=5, doubt="8 threads ran on 2 processors").in_doubt
            'between 1.2 and 2.9 times: 8 threads ran on 2 processors'
            >>> Speedup(ratio=120, low=0.3, high=900, rounds=5, doubt="8 threads ran on 2 processors").in_doubt
            'not measured: 8 threads ran on 2 processors'
        """
        if not self.doubt:
            return ""
        known = f"between {self.low:.3g} and {self.high:.3g} times" if self.high <= _WIDE * self.low else "not measured"
        return f"{known}: {self.doubt}"


class Environment(Record):
    """Where and with what a result was made."""

    tenfold: str
    python: str
    torch: str
    device: str
    device_name: str = ""
    threads: int
    platform: str
    versions: dict[str, str] = {}


class Call(Record):
    """How often a layer was called with an input of one shape."""

    in_shape: Annotated[Shape, Field(description="shape of the first input, batch included")]
    out_shape: Shape = ()
    count: int = 1


class LayerProfile(Record):
    """One layer of the model: what it is, how it is used and what it costs.

    ``spec`` is None when no format could ever serve the layer; ``note`` then says why. A factorized layer has the
    ``format`` and ``rank`` that it has now, and the ``spec`` of the dense layer that it stands for.

    ``aliases`` are further paths of the same module. ``tied`` are paths of other modules that hold one of its
    parameters too; that parameter is counted in the first of them only. ``read`` tells that others compute with its
    weight. ``bytes`` are those of parameters and buffers,
    ``activation_bytes`` those of all its outputs in one forward. Times are the medians and interquartile ranges of one
    forward's calls together.
    """

    path: str
    aliases: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    read: bool = False
    kind: str
    spec: LayerSpec | None = None
    format: str | None = None
    rank: dict[str, int] | None = None
    note: str = ""
    params: NonNegativeInt
    bytes: NonNegativeInt
    macs: NonNegativeInt
    calls: tuple[Call, ...] = ()
    activation_bytes: NonNegativeInt = 0
    latency_ms: float | None = None
    latency_spread_ms: float | None = None

    @property
    def cost(self) -> Cost:
        """Parameters and MACs of the layer as it is now."""
        return Cost(params=self.params, macs=self.macs)

    @property
    def num_calls(self) -> int:
        """How often one forward of the model calls the layer."""
        return sum(c.count for c in self.calls)

    @property
    def reached(self) -> bool:
        """Whether it was called on anything: experts that no token is routed to may be called on no rows."""
        return any(prod(call.in_shape) for call in self.calls)


class Profile(Record):
    """What a model costs on some example inputs. Every MAC of the forward is in ``macs``.

    ``other_macs`` are those outside of all layers: ``macs`` is the sum over ``layers`` plus ``other_macs``.
    ``fused_macs`` are those, by kernel, that torch's flop counter has no formula for while it does count the same
    mathematics written without the fused kernel; they are part of ``macs``. ``uncounted`` lists operations that may do
    multiply-accumulates and that nobody has a formula for, with the number of calls; they are not in ``macs``.
    ``units`` are groups of layers that could be narrowed together, where somebody looked for them.
    """

    version: int = SCHEMA_VERSION
    model: str
    params: NonNegativeInt
    bytes: NonNegativeInt
    macs: NonNegativeInt
    input_shapes: tuple[Shape, ...] = ()
    layers: tuple[LayerProfile, ...]
    other_macs: NonNegativeInt = 0
    fused_macs: dict[str, int] = {}
    uncounted: dict[str, int] = {}
    latency: Latency | None = None
    environment: Environment
    units: tuple[Unit, ...] = ()

    @property
    def cost(self) -> Cost:
        """Parameters and MACs of the whole model."""
        return Cost(params=self.params, macs=self.macs)

    def layer(self, path: str) -> LayerProfile:
        """Return the layer at ``path``; raises KeyError when there is none."""
        for layer in self.layers:
            if path == layer.path or path in layer.aliases:
                return layer
        raise KeyError(path)
