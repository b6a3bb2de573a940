"""One stage, as a training loop gets it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from tenfold.records import Plan, StageRecord


@dataclass(frozen=True, eq=False)
class Stage:
    """A model that was just compressed a little further, and is to be trained in place.

    Attributes:
        index: counted from 1.
        model: an ordinary module; train it in place, by any loop.
        plan: what this stage did to the model of the stage before.
        whole: what all stages so far did to the original model; what ``save`` wants together with the model.
        record: costs, ranks and scores as they are now.
        epochs: of training that the schedule gives this stage.
        done_epochs: those that it gave the stages before.
        final: whether nothing was compressed, and the stage only trains.
        folder: for what the training keeps on its way, such as ``finetune(folder=stage.folder)``: then it goes on in
            the middle of a stage too. Removed when the stage is complete; None for a run without a folder.
        identity: names the run and the stage, for such a folder.
    """

    index: int
    model: nn.Module = field(repr=False)
    plan: Plan = field(repr=False)
    whole: Plan = field(repr=False)
    record: StageRecord
    epochs: int
    done_epochs: int = 0
    final: bool = False
    folder: Path | None = None
    identity: str = ""
