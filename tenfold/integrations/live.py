"""Compress a model in place, with the optimizer's parameters, while a foreign loop trains it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tenfold.errors import TuningError
from tenfold.iterative import Stage
from tenfold.iterative.run import Stages
from tenfold.layers import FactorizedLayer
from tenfold.pipeline import Compressed
from tenfold.records import Plan, StageRecord
from tenfold.surgery import find, note_in_config_, put
from tenfold.tracing import copied
from tenfold.tracing.contexts import kept_modes
from tenfold.training import Admm, AdmmConfig
from tenfold.training.low_rank.admm import Residual

Optimizers = Sequence[Any]  # torch optimizers, or what wraps them: with param_groups and state


class LiveStages:
    """Iterative compression of the very model that a foreign loop is training.

    Call ``begin`` when training begins and ``epoch_ended`` after each epoch: after every ``schedule.epochs`` of them
    the next stage takes place. Factors enter the optimizer in the group of the weight that they replace; the optimizer
    forgets its state of the weight, all else and the learning-rate schedule stay.

    For one process, without a folder. To be able to resume, use ``tenfold.stages``.

    Args:
        start: returns the stages of a model, such as ``lambda model: tenfold.stages(model, inputs, schedule)``; called
            with a copy of the trained model.
        on_stage: called with the record of each stage as it begins: ``Board.stage`` for one.

    Example:
        >>> from tenfold.iterative import Schedule, stages
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> optimizer = torch.optim.Adam(net.parameters())
        >>> schedule = Schedule(rounds=2, epochs=1)
        >>> live = LiveStages(lambda model: stages(model, torch.zeros(1, 64), "macs=0.25", schedule))
        >>> live.begin(net, [optimizer])
        >>> for _ in range(2):
        ...     live.epoch_ended(net, [optimizer])  # after an epoch of training
        >>> live.result.record.after.macs
        2048
    """

    def __init__(
        self, start: Callable[[nn.Module], Stages], *, on_stage: Callable[[StageRecord], None] | None = None
    ) -> None:
        self.result: Compressed | None = None
        self._start = start
        self._on_stage = on_stage
        self._running: Stages | None = None
        self._stage: Stage | None = None
        self._epochs = 0

    def begin(self, model: nn.Module, optimizers: Optimizers) -> None:
        """Carry out the first stage.

        Raises:
            TuningError: several processes train the model, or the stages are stored in a folder.
            TenfoldError: see ``tenfold.stages``.
        """
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() > 1:
            msg = (
                "stages in place are for one process: use tenfold.compress_iteratively with an accelerator for several"
            )
            raise TuningError(msg)
        self._running = self._start(copied(model))
        self._next(model, optimizers)

    def epoch_ended(self, model: nn.Module, optimizers: Optimizers) -> None:
        """Count an epoch; carry out the next stage if this one is complete."""
        if self._stage is None:
            return
        self._epochs += 1
        if self._epochs >= self._stage.epochs:
            self._stage.model.load_state_dict(model.state_dict())
            self._next(model, optimizers)

    def _next(self, model: nn.Module, optimizers: Optimizers) -> None:
        assert self._running is not None  # noqa: S101 - begin() has set it
        self._epochs = 0
        try:
            self._stage = next(self._running)
        except StopIteration as end:
            self._stage, self.result = None, end.value
            return
        if self._stage.folder is not None:
            msg = "a model that is trained in place cannot be resumed from a folder: use tenfold.stages for that"
            raise TuningError(msg)
        graft_(model, self._stage.model, optimizers)
        if self._on_stage is not None:
            self._on_stage(self._stage.record)


def graft_(model: nn.Module, small: nn.Module, optimizers: Optimizers) -> None:
    """Move the factorized layers and values of a compressed copy into a model, and their parameters into optimizers.

    Args:
        model: changed in place.
        small: a copy in which layers were factorized; shares them with the model afterwards.
        optimizers: of the model.
    """
    new: dict[str, nn.Module] = {p: m for p, m in small.named_modules() if isinstance(m, FactorizedLayer)}
    if "" in new:
        msg = "the model is one layer itself, which cannot be replaced in place: put it into an nn.Sequential"
        raise TuningError(msg)
    pairs = [(find(model, path), layer) for path, layer in new.items()]
    with kept_modes(model):
        note_in_config_(put(model, new))
    for optimizer in optimizers:
        for old, layer in pairs:
            _exchange(optimizer, old, layer)
    with torch.no_grad():
        values = small.state_dict()
        for name, tensor in model.state_dict().items():
            tensor.copy_(values[name])


def _exchange(optimizer: Any, old: nn.Module, new: nn.Module) -> None:
    """Replace the parameters of one layer by those of another: weights by factors, bias by bias."""
    for kind in ("weight", "bias"):
        gone = [p for n, p in old.named_parameters() if n.endswith(kind)]
        come = [p for n, p in new.named_parameters() if n.endswith(kind)]
        for group in optimizer.param_groups:
            held = [any(p is g for g in gone) for p in group["params"]]
            if any(held):
                group["params"] = [p for p, is_gone in zip(group["params"], held, strict=True) if not is_gone] + come
        for parameter in gone:
            optimizer.state.pop(parameter, None)


class LivePull:
    """Training to low rank (see ``Admm``) in a foreign loop: the penalty is added to the gradients.

    Call ``begin`` when training begins, ``before_step`` when gradients are complete, ``epoch_ended`` after each epoch.
    Clip gradients before, and train in float32 or bfloat16: scaled gradients would drown the penalty.

    Args:
        plan: formats and ranks to reach.
        config: strength of the penalty.
        on_update: called with the residuals by path after each update, and its number: ``Board.admm`` for one.
    """

    def __init__(
        self,
        plan: Plan,
        config: AdmmConfig | None = None,
        *,
        on_update: Callable[[Mapping[str, Residual], int], None] | None = None,
    ) -> None:
        self.plan, self.config = plan, config
        self.admm: Admm | None = None
        self._on_update = on_update
        self._updates = 0

    def begin(self, model: nn.Module) -> None:
        """Start from the current weights."""
        self.admm = Admm(model, self.plan, self.config)

    def before_step(self, model: nn.Module) -> None:
        """Add the gradient of the penalty to those of the weights."""
        if self.admm is not None:
            self.admm.penalty(model).backward()

    def epoch_ended(self, model: nn.Module) -> None:
        """Update the low-rank images and the multipliers."""
        if self.admm is None:
            return
        found = self.admm.update(model)
        self._updates += 1
        if self._on_update is not None:
            self._on_update(found, self._updates)
