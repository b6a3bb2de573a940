"""Callbacks for the ``Trainer`` of transformers: compression in stages, and training towards low rank."""

from __future__ import annotations

from typing import Any

from tenfold.errors import require
from tenfold.integrations.live import LivePull, LiveStages

__all__ = ["LowRankCallback", "StagesCallback"]

_transformers: Any = require("transformers", "hf")


class StagesCallback(_transformers.TrainerCallback):  # type: ignore[misc]
    """Compresses the model of a ``Trainer`` in stages: ``Trainer(..., callbacks=[StagesCallback(live)])``.

    Args:
        live: what to do; its ``result`` is there once the last stage is trained.
    """

    def __init__(self, live: LiveStages) -> None:
        self.live = live

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Carry out the first stage."""
        del args, state, control
        self.live.begin(given["model"], [given["optimizer"]])

    def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Carry out the next stage when the last one is trained."""
        del args, state, control
        self.live.epoch_ended(given["model"], [given["optimizer"]])


class LowRankCallback(_transformers.TrainerCallback):  # type: ignore[misc]
    """Draws the weights of the model of a ``Trainer`` to low rank while it trains; decompose it afterwards."""

    def __init__(self, pull: LivePull) -> None:
        self.pull = pull

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Look at the weights for the first time."""
        del args, state, control
        self.pull.begin(given["model"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Add the gradient of the penalty, after clipping."""
        del args, state, control
        self.pull.before_step(given["model"])

    def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Draw the low-rank images after the weights."""
        del args, state, control
        self.pull.epoch_ended(given["model"])
