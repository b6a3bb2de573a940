"""What a compression run leaves on record: measurements, stages, exported files."""

from __future__ import annotations

from typing import Any

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from tenfold.records.agreement import Agreement
from tenfold.records.base import Record
from tenfold.records.costs import Cost, Environment, Latency, Speedup
from tenfold.records.introduced import Introduced
from tenfold.records.metric import FRACTION, Metric
from tenfold.records.plans import PLAN_VERSION, Plan, check_version


class Measurement(Record):
    """A model as measured: cost, latency and score (of the run's ``metric``; None when it was not evaluated)."""

    params: int
    macs: int
    bytes: int | None = None
    latency_ms: float | None = None
    latency: Latency | None = None
    score: float | None = None


class StageLayer(Record):
    """What a stage made of one layer: its format and ranks now, and what it was (None: dense)."""

    format: str
    rank: dict[str, PositiveInt]
    was_format: str | None = None
    was_rank: dict[str, PositiveInt] | None = None
    rel_error: NonNegativeFloat | None = None


class StageRecord(Record):
    """One stage: what it was to reach, what it changed, and what came of it.

    Attributes:
        index: of the stage, counted from 1.
        round: how often the layers of this stage have been visited, this time included.
        final: whether it changes no layer and only trains on.
        limits: what the whole model might cost after the round, by name; empty where the rule alone decides.
        before: what the model cost as the stage found it.
        after: what it costs since.
        layers: what was changed, by path.
        scores: ``compressed`` before the training of the stage and ``tuned`` after it, as far as somebody evaluated.
        tuning: the epochs of the built-in training.
        seconds: by step.
        latency_share: predicted time as a share of that of the original model; None without a budget of latency.
    """

    index: PositiveInt
    round: PositiveInt
    final: bool = False
    limits: dict[str, float] = {}
    before: Cost
    after: Cost
    layers: dict[str, StageLayer] = {}
    scores: dict[str, float] = {}
    tuning: tuple[dict[str, Any], ...] = ()
    seconds: dict[str, float] = {}
    latency_share: NonNegativeFloat | None = None


class Int8Record(Record):
    """How a file in floating point was turned into one with eight-bit integers.

    Attributes:
        samples: how many inputs the ranges of the activations were taken from.
        operators: how many operators of each type read integers, activations between two of them included.
        rescaled: of how many activations the channels were given a common range, by weights before and after.
        rounded: in how many layers weights were rounded for the outputs, not each to the nearest integer.
        was_bytes: size of the file before.
        noise: root mean square of the change of the outputs, by that of the outputs, on those samples.
        agreement: share of those samples whose largest output is the same; None where outputs are no class scores.
        speedup: over the file before, measured in turns; None where latency was not measured.
    """

    samples: PositiveInt
    operators: dict[str, PositiveInt]
    rescaled: NonNegativeInt = 0
    rounded: NonNegativeInt = 0
    was_bytes: PositiveInt
    noise: NonNegativeFloat
    agreement: NonNegativeFloat | None = None
    speedup: Speedup | None = None


class ExportRecord(Introduced):
    """One exported file.

    Use it to see how far a file agrees with its model, and how fast it is; ``export`` returns it, reports show it.

    Attributes:
        target: what it was exported to, such as ``onnx``.
        file: its name.
        bytes: its size, and that of the files beside it that belong to it.
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


class RunRecord(Introduced):
    """The outcome of a compression run: everything that a report shows, without any weights.

    Use it to report on runs and to compare them: it lies as ``record.json`` in every saved folder.

    ``metric`` says what all scores in it are.
    """

    version: int = PLAN_VERSION
    task: str | None = None
    command: str | None = None
    seed: int = 0
    before: Measurement
    after: Measurement
    speedup: Speedup | None = None
    scores: dict[str, float] = {}
    metric: Metric = FRACTION
    agreement: Agreement | None = None
    plan: Plan
    tuning: tuple[dict[str, Any], ...] = ()
    stages: tuple[StageRecord, ...] = ()
    seconds: dict[str, float] = {}
    settings: dict[str, Any] = {}
    exports: tuple[ExportRecord, ...] = ()
    environment: Environment

    @model_validator(mode="before")
    @classmethod
    def _check_version(cls, values: Any) -> Any:
        return check_version("record", values)
