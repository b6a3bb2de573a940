"""Callbacks for Lightning: compression in stages, and training towards low rank.

They have the hooks of ``lightning.Callback``, and derive from it where Lightning is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any

from torch import nn

from tenfold.integrations.live import LivePull, LiveStages

__all__ = ["LowRankCallback", "StagesCallback"]

_Base: Any = object
for _name in ("lightning.pytorch", "pytorch_lightning"):
    with suppress(ImportError):
        _Base = import_module(_name).Callback
        break

Which = Callable[[Any], nn.Module]


def _itself(module: Any) -> nn.Module:
    found: nn.Module = module
    return found


class StagesCallback(_Base):  # type: ignore[misc]
    """Compresses the module of a ``lightning.Trainer`` in stages while it trains.

    Args:
        live: what to do; its ``result`` is there once the last stage is trained.
        of: the part of the module to compress, such as ``lambda module: module.net``; the module itself if left out.
    """

    def __init__(self, live: LiveStages, of: Which = _itself) -> None:
        super().__init__()
        self.live, self.of = live, of

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Carry out the first stage."""
        self.live.begin(self.of(pl_module), trainer.optimizers)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Carry out the next stage when the last one is trained."""
        self.live.epoch_ended(self.of(pl_module), trainer.optimizers)


class LowRankCallback(_Base):  # type: ignore[misc]
    """Draws the weights of the module of a ``lightning.Trainer`` to low rank while it trains; decompose it afterwards.

    Args:
        pull: how.
        of: the part of the module whose weights the plan names; the module itself if left out.
    """

    def __init__(self, pull: LivePull, of: Which = _itself) -> None:
        super().__init__()
        self.pull, self.of = pull, of

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Look at the weights for the first time."""
        del trainer
        self.pull.begin(self.of(pl_module))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Add the gradient of the penalty."""
        del trainer, optimizer
        self.pull.before_step(self.of(pl_module))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Draw the low-rank images after the weights."""
        del trainer
        self.pull.epoch_ended(self.of(pl_module))
