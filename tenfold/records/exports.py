"""What an exported file is: its size, how far its outputs are from the model's, and how fast it runs."""

from __future__ import annotations

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from tenfold.records.base import Record
from tenfold.records.costs import Environment, Latency, Speedup


class Int8Record(Record):
    """How a file in floating point was turned into one with eight-bit integers.

    Attributes:
        samples: how many inputs the ranges of the activations were taken from.
        operators: how many operators of each type read integers, activations between two of them included.
        was_bytes: size of the file before.
        noise: root mean square of the change of the outputs, by that of the outputs, on those samples.
        agreement: share of those samples whose largest output is the same; None where outputs are no class scores.
        speedup: over the file before, measured in turns; None where latency was not measured.
    """

    samples: PositiveInt
    operators: dict[str, PositiveInt]
    was_bytes: PositiveInt
    noise: NonNegativeFloat
    agreement: NonNegativeFloat | None = None
    speedup: Speedup | None = None


class ExportRecord(Record):
    """One exported file.

    Attributes:
        target: what it was exported to, such as ``onnx``.
        file: its name.
        bytes: its size.
        opset: version of the operators, where the target has one.
        dynamic_batch: whether it takes batches of any size.
        fused: how many batch norms were merged into the layers before them.
        parity: largest error of an output against eager execution, by the size of the batch: |a − b| by the largest
            |a| of that output. Of the file in floating point, where that was quantized afterwards.
        tolerance: what the errors had to stay below.
        int8: how it was quantized; None for floating point.
        eager: latency of the model in torch; None where it was not measured.
        latency: latency of the file in its runtime.
        speedup: how many times faster the file is than the model in torch, measured in turns.
        environment: versions and machine.
    """

    target: str
    file: str
    bytes: PositiveInt
    opset: PositiveInt | None = None
    dynamic_batch: bool
    fused: NonNegativeInt = 0
    parity: dict[PositiveInt, NonNegativeFloat]
    tolerance: NonNegativeFloat
    int8: Int8Record | None = None
    eager: Latency | None = None
    latency: Latency | None = None
    speedup: Speedup | None = None
    environment: Environment
