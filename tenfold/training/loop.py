"""One epoch of training: forward, backward, accumulate, clip, step, check."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.errors import TuningError
from tenfold.records.tuning import EpochRecord, TuneConfig
from tenfold.surgery.batchnorm import BATCH_NORMS
from tenfold.tracing.inputs import to_device
from tenfold.training.as_dense import as_dense
from tenfold.training.batches import Batch, as_pair, grouped, peek
from tenfold.training.distributed import SingleProcess
from tenfold.training.ema import Average
from tenfold.training.optimizer import learning_rate
from tenfold.training.precision import place, uses_bf16
from tenfold.training.tune_progress import TuneProgress

Loss = Callable[[nn.Module, Any, Any], Tensor]
Evaluate = Callable[[nn.Module], float | None]
CHECK_EVERY = 32  # steps between checks of the loss where reading it waits for the device


@dataclass(frozen=True)
class Loop:
    """Everything that stays constant from step to step."""

    model: nn.Module
    called: nn.Module  # the model, or its wrapper where several processes train
    optimizer: torch.optim.Optimizer
    config: TuneConfig
    loss: Loss
    device: torch.device
    channels_last: bool
    steps: int
    progress: TuneProgress
    processes: SingleProcess
    average: Average | None

    def epoch(self, epoch: int, data: Iterable[Batch], evaluate: Evaluate | None, *, dense: bool) -> EpochRecord:
        """Train an epoch, counted from 0, and return its record; factors are multiplied out if ``dense``."""
        start = time.perf_counter()
        self.called.train()
        if self.config.freeze_norms:
            for module in self.model.modules():
                if isinstance(module, BATCH_NORMS):
                    module.eval()
        with as_dense(self.model, enabled=dense):
            loss, rate = self._train(epoch, data)
        self._check_weights(epoch)
        self.processes.sync_buffers_(self.model)
        seconds = time.perf_counter() - start
        score = None
        if evaluate:
            self.model.eval()
            with torch.no_grad(), self.average.shown(self.model) if self.average else nullcontext():
                score = evaluate(self.model)
            score = None if score is None else self.processes.from_main(float(score))
        return EpochRecord(epoch=epoch + 1, loss=loss, lr=rate, score=score, seconds=seconds)

    def _train(self, epoch: int, data: Iterable[Batch]) -> tuple[float, float]:
        """Return the mean loss and the last learning rate."""
        config, optimizer = self.config, self.optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        updates = -(-self.steps // config.accumulate)
        total, rate, done = torch.zeros((), device=self.device), 0.0, 0
        for number, group in enumerate(grouped(data, config.accumulate), epoch * updates):
            rate = learning_rate(number, config.epochs * updates, peak=config.lr, warmup=config.warmup)
            for parameter_group in optimizer.param_groups:
                parameter_group["lr"] = rate
            for left, batch in zip(reversed(range(len(group))), group, strict=True):
                with self.processes.no_sync(self.called) if left else nullcontext():
                    value = self.loss_of(self.called, batch)
                    self._check_now_and_then(value, epoch, done, rate)
                    self.processes.backward(value / len(group) if len(group) > 1 else value)
                total += value.detach()
                done += 1
                self.progress.advance(value.detach())
            if config.clip_norm is not None:
                self.processes.clip(parameters, config.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if self.average is not None:
                self.average.update_(self.model, number)
        if done == 0:
            peek(())  # an epoch without batches is the same error wherever it comes
        self._check_loss(total, epoch, done - 1, rate)
        return self.processes.mean(total) / done, rate

    def loss_of(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss of the model, or of a copy of it, on a batch."""
        bf16 = not self.processes.sets_precision and uses_bf16(self.model, self.device, self.config.autocast)
        inputs, targets = as_pair(batch)
        inputs = place(inputs, self.device, channels_last=self.channels_last)
        targets = to_device(targets, self.device)
        with torch.autocast(self.device.type, torch.bfloat16) if bf16 else self.processes.autocast():
            return self.loss(model, inputs, targets)

    def _check_now_and_then(self, value: Tensor, epoch: int, step: int, rate: float) -> None:
        """Check the loss, but not at every step where reading it waits for the device."""
        if self.device.type == "cpu" or step % CHECK_EVERY == 0:
            self._check_loss(value, epoch, step, rate)

    def _check_loss(self, value: Tensor, epoch: int, step: int, rate: float) -> None:
        if not torch.isfinite(value):
            msg = (
                f"the loss is {value.item()} in epoch {epoch + 1}, step {step + 1}, at learning rate {rate:.2g}. "
                "Lower lr or clip_norm, or check the data; the weights of the model are not to be used now."
            )
            raise TuningError(msg)

    def _check_weights(self, epoch: int) -> None:
        for name, parameter in self.model.named_parameters():
            if not torch.isfinite(parameter).all():
                msg = f"{name!r} is not finite after epoch {epoch + 1}. Lower lr or clip_norm, or check the data."
                raise TuningError(msg)
