"""Compress a model while somebody else's loop trains it: layers and the optimizer's parameters change in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tenfold.errors import TuningError
from tenfold.layers import FactorizedLayer
from tenfold.pipeline import Compressed
from tenfold.records import Plan, StageRecord
from tenfold.staging import Schedule, Stage, stages
from tenfold.surgery import find
from tenfold.surgery.modules import put
from tenfold.training import Admm, AdmmConfig
from tenfold.training.low_rank.admm import Residual

Optimizers = Sequence[Any]  # torch optimizers, or what wraps them: with param_groups and state


class LiveStages:
    """Compression in stages, carried out on the very model that a loop is training.

    Call ``begin`` when training begins and ``epoch_ended`` after each epoch: after every ``schedule.epochs`` of them
    the next stage takes place. Factors enter the optimizer in the group of the weight that they replace; what that
    remembered of the weight goes, all else and the learning rate schedule stay.

    One process; with a folder of its own, or to be killed and resumed, use ``tenfold.stages``.

    Args:
        example_inputs: what the forward of the model takes.
        schedule: in how many stages, and how far in each.
        data: unlabeled batches; see ``tenfold.stages``.
        on_stage: called with the record of each stage as it begins: ``Board.stage`` for one.
        choices: all else that ``tenfold.stages`` takes, but for a folder.

    Example:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> optimizer = torch.optim.Adam(net.parameters())
        >>> live = LiveStages(torch.zeros(1, 64), Schedule(rounds=2, epochs=1, budget={"macs": 0.25}))
        >>> live.begin(net, [optimizer])
        >>> for _ in range(2):
        ...     live.epoch_ended(net, [optimizer])  # after an epoch of training
        >>> live.result.record.after.macs
        2048
    """

    def __init__(
        self,
        example_inputs: Any,
        schedule: Schedule | Mapping[str, Any],
        *,
        data: Iterable[Any] | None = None,
        on_stage: Callable[[StageRecord], None] | None = None,
        **choices: Any,
    ) -> None:
        if choices.get("folder") is not None or choices.get("fit_to", "current") != "current":
            msg = "a model that is trained in place has no folder and no original: use tenfold.stages for these"
            raise TuningError(msg)
        self.schedule = Schedule.of(dict(schedule)) if isinstance(schedule, Mapping) else schedule
        self.result: Compressed | None = None
        self._given = {"example_inputs": example_inputs, "data": data, **choices}
        self._on_stage = on_stage
        self._running: Any = None
        self._stage: Stage | None = None
        self._epochs = 0

    def begin(self, model: nn.Module, optimizers: Optimizers) -> None:
        """Carry out the first stage.

        Raises:
            TuningError: several processes train the model.
            TenfoldError: see ``tenfold.stages``.
        """
        spread = torch.distributed.is_available() and torch.distributed.is_initialized()
        if spread and torch.distributed.get_world_size() > 1:
            msg = "stages in place are for one process: use tenfold.run_stages with an accelerator for several"
            raise TuningError(msg)
        self._running = stages(model, schedule=self.schedule, **self._given)
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
        self._epochs = 0
        try:
            self._stage = next(self._running)
        except StopIteration as end:
            self._stage, self.result = None, end.value
            return
        graft_(model, self._stage.model, optimizers)
        if self._on_stage is not None:
            self._on_stage(self._stage.record)


def graft_(model: nn.Module, small: nn.Module, optimizers: Optimizers) -> None:
    """Give the model the factorized layers of a compressed copy and its values, and the optimizers the parameters.

    Args:
        model: changed in place.
        small: a copy in which layers were factorized; shares them with the model afterwards.
        optimizers: of the model.
    """
    modes = [(module, module.training) for module in model.modules()]
    new: dict[str, nn.Module] = {p: m for p, m in small.named_modules() if isinstance(m, FactorizedLayer)}
    if "" in new:
        msg = "the model is one layer itself, which cannot be replaced in place: put it into an nn.Sequential"
        raise TuningError(msg)
    pairs = [(find(model, path), layer) for path, layer in new.items()]
    put(model, new)
    for module, training in modes:
        module.training = training
    for optimizer in optimizers:
        for old, layer in pairs:
            _exchange(optimizer, old, layer)
    with torch.no_grad():
        values = small.state_dict()
        for name, tensor in model.state_dict().items():
            tensor.copy_(values[name])


def _exchange(optimizer: Any, old: nn.Module, new: nn.Module) -> None:
    """Put the parameters of a layer in the place of those of another, by kind: weights for weights, bias for bias."""
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
    """Training towards low rank (see ``Admm``) in a loop that is not ours: the penalty goes straight into gradients.

    Call ``begin`` when training begins, ``before_step`` when gradients are complete, ``epoch_ended`` after each epoch.
    Clip gradients before, and train in float32 or bfloat16: gradients that are scaled up would drown the pull.

    Args:
        plan: formats and ranks to reach; what is to be factorized in the end.
        config: how hard to pull.
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
        """Look at the weights for the first time."""
        self.admm = Admm(model, self.plan, self.config)

    def before_step(self, model: nn.Module) -> None:
        """Add the gradient of the penalty to those of the weights."""
        if self.admm is not None:
            self.admm.penalty(model).backward()

    def epoch_ended(self, model: nn.Module) -> None:
        """Draw the low-rank images and the multipliers after the weights."""
        if self.admm is None:
            return
        found = self.admm.update(model)
        self._updates += 1
        if self._on_update is not None:
            self._on_update(found, self._updates)
