"""What one stage of a compression in several stages did."""

from __future__ import annotations

from typing import Any

from pydantic import NonNegativeFloat, PositiveInt

from tenfold.records.base import Record
from tenfold.records.costs import Cost


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
