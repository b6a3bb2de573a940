"""Callbacks for the ``Trainer`` of transformers: iterative compression, and training to low rank."""

from __future__ import annotations

from typing import Any

from tenfold.errors import require
from tenfold.integrations.live import LivePull, LiveStages

__all__ = ["LowRankCallback", "StagesCallback"]

_transformers: Any = require("transformers", "hf")


class StagesCallback(_transformers.TrainerCallback):  # type: ignore[misc]
    """Compresses the model of a ``Trainer`` in stages: ``Trainer(..., callbacks=[StagesCallback(live)])``.

    Args:
        live: the stages; has a ``result`` after the last one.
    """

    def __init__(self, live: LiveStages) -> None:
        self.live = live

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Start the first stage."""
        del args, state, control
        self.live.begin(given["model"], [given["optimizer"]])

    def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Start the next stage if the current one is complete."""
        del args, state, control
        self.live.epoch_ended(given["model"], [given["optimizer"]])


class LowRankCallback(_transformers.TrainerCallback):  # type: ignore[misc]
    """Trains the weights of the model of a ``Trainer`` to low rank; decompose it afterwards."""

    def __init__(self, pull: LivePull) -> None:
        self.pull = pull

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Start from the current weights."""
        del args, state, control
        self.pull.begin(given["model"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Add the gradient of the penalty, after clipping."""
        del args, state, control
        self.pull.before_step(given["model"])

    def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Update the low-rank images."""
        del args, state, control
        self.pull.epoch_ended(given["model"])
