"""Callbacks for Lightning: iterative compression, and training to low rank.

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
        live: the stages; has a ``result`` after the last one.
        of: the part of the module to compress, such as ``lambda module: module.net``; the module itself if left out.
    """

    def __init__(self, live: LiveStages, of: Which = _itself) -> None:
        super().__init__()
        self.live, self.of = live, of

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the first stage."""
        self.live.begin(self.of(pl_module), trainer.optimizers)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Start the next stage if the current one is complete."""
        self.live.epoch_ended(self.of(pl_module), trainer.optimizers)


class LowRankCallback(_Base):  # type: ignore[misc]
    """Trains the weights of the module of a ``lightning.Trainer`` to low rank; decompose it afterwards.

    Args:
        pull: penalty and updates.
        of: the part of the module whose weights the plan names; the module itself if left out.
    """

    def __init__(self, pull: LivePull, of: Which = _itself) -> None:
        super().__init__()
        self.pull, self.of = pull, of

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start from the current weights."""
        del trainer
        self.pull.begin(self.of(pl_module))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Add the gradient of the penalty."""
        del trainer, optimizer
        self.pull.before_step(self.of(pl_module))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Update the low-rank images."""
        del trainer
        self.pull.epoch_ended(self.of(pl_module))
