"""Fine-tuning on a page: supervised, resumable after a kill, and the same to the last bit when it is."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.errors import CheckpointError, TuningError
from tenfold.profiling.inputs import call_model, to_device
from tenfold.tuning.acceleration import channels_last_weights, place, uses_bf16, uses_channels_last
from tenfold.tuning.batches import Batch, Batches, as_pair, at_epoch, count_steps, peek
from tenfold.tuning.config import EpochRecord, TuneConfig, TuneResult
from tenfold.tuning.groups import build_optimizer
from tenfold.tuning.modes import device_of, forked_rng, kept_modes, seed_epoch
from tenfold.tuning.progress import Silent, TuneProgress
from tenfold.tuning.schedule import learning_rate
from tenfold.tuning.snapshot import Snapshot, TuneState

logger = logging.getLogger("tenfold")

Loss = Callable[[nn.Module, Any, Any], Tensor]
CHECK_EVERY = 32  # steps between looks at the loss on a device where looking means waiting


def finetune(
    model: nn.Module,
    batches: Batches,
    config: TuneConfig | None = None,
    *,
    loss: Loss | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    folder: str | Path | None = None,
    identity: str = "",
    on_epoch: Callable[[EpochRecord], None] | None = None,
    progress: TuneProgress | None = None,
) -> TuneResult:
    """Return the history of training the model in place.

    With a ``folder``, every complete epoch is stored in it. The same call with the same folder goes on after the last
    complete epoch, in a new process too, and ends, on the same CPU, bit for bit where an uninterrupted run ends; a run
    that is finished returns at once. What is not stored is made a function of the epoch: the learning rate, and torch's
    global generators, which are seeded anew for each epoch and given back to the caller as they were. A DataLoader that
    shuffles with a generator of its own goes on from wherever that is: leave it out, or pass a function of the epoch.

    Afterwards train modes, ``requires_grad`` and memory layouts are as they were, and gradients are None.

    Args:
        model: trained in place on its own device, in train mode.
        batches: function from the epoch (counted from 0) to an iterable of (inputs, targets), or something that can
            be gone through once per epoch. Inputs as ``call_model`` takes them. Without ``len``, epoch 0 is gone
            through once just to count the steps.
        config: how to train; ``TuneConfig()`` if left out.
        loss: maps (model, inputs, targets) to a scalar; smoothed cross-entropy of ``model(inputs)`` (or of its
            ``logits``) by default. A teacher, or a penalty, comes in here.
        evaluate: gives the model, in eval mode and without gradients, a score after each epoch.
        folder: where to store the epochs; nowhere by default.
        identity: what the run is about, in any words, such as a digest of the plan; a folder of another is refused.
        on_epoch: told of each epoch when it is complete and stored.
        progress: told of each step, such as a ``RichProgress()``.

    Raises:
        TuningError: nothing requires grad, or loss or weights are no longer finite.
        DataError: no batches, or batches that are not pairs.
        CheckpointError: a folder that is not writable, or holds a damaged file or another run.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> x = torch.randn(64, 2)
        >>> result = finetune(model, [(x, (x[:, 0] > 0).long())], TuneConfig(epochs=20, lr=0.5))
        >>> result.history[-1].loss < result.history[0].loss
        True
    """
    config, progress = config or TuneConfig(), progress or Silent()
    snapshot = Snapshot(folder, config, identity) if folder is not None else None
    state = snapshot.read() if snapshot else None
    history = list(state.history) if state else []
    done = len(history)
    if done:
        logger.info("resuming after epoch %d of %d from %s", done, config.epochs, folder)
    if done >= config.epochs:
        if snapshot and done:
            snapshot.restore(model)
        return TuneResult(config=config, history=tuple(history), resumed=done)

    device = device_of(model)
    with forked_rng(device), kept_modes(model):
        steps = _steps(batches, state, folder)
        seed_epoch(device, config.seed, done)
        first, data = peek(at_epoch(batches, done))
        layout = uses_channels_last(model, to_device(first, device), config.channels_last)
        with channels_last_weights(model, enabled=layout):
            optimizer = build_optimizer(model, config)
            if snapshot and state:
                snapshot.restore(model, optimizer)
            run = _Run(model, optimizer, config, loss or _cross_entropy(config), device, layout, steps, progress)
            progress.start(epochs=config.epochs, steps=steps, done=done)
            try:
                for epoch in range(done, config.epochs):
                    if epoch > done:
                        seed_epoch(device, config.seed, epoch)
                        data = at_epoch(batches, epoch)
                    history.append(run.epoch(epoch, data, evaluate))
                    if snapshot:
                        snapshot.write(_state(run, identity, history), model, optimizer)
                    progress.end_epoch(history[-1])
                    if on_epoch:
                        on_epoch(history[-1])
            finally:
                optimizer.zero_grad(set_to_none=True)
                progress.stop()
    return TuneResult(config=config, history=tuple(history), resumed=done)


@dataclass(frozen=True)
class _Run:
    """All that stays the same from step to step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    config: TuneConfig
    loss: Loss
    device: torch.device
    channels_last: bool
    steps: int
    progress: TuneProgress

    def epoch(self, epoch: int, data: Iterable[Batch], evaluate: Callable[[nn.Module], float] | None) -> EpochRecord:
        """Return the record of an epoch after training it, counted from 0."""
        start = time.perf_counter()
        self.model.train()
        loss, rate = self._train(epoch, data)
        self._check_weights(epoch)
        seconds = time.perf_counter() - start
        score = None
        if evaluate:
            self.model.eval()
            with torch.no_grad():
                score = float(evaluate(self.model))
        return EpochRecord(epoch=epoch + 1, loss=loss, lr=rate, score=score, seconds=seconds)

    def _train(self, epoch: int, data: Iterable[Batch]) -> tuple[float, float]:
        """Return the mean loss and the last learning rate of an epoch."""
        config, optimizer = self.config, self.optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        bf16 = uses_bf16(self.model, self.device, config.autocast)
        check_every = 1 if self.device.type == "cpu" else CHECK_EVERY
        total, rate, step = torch.zeros((), device=self.device), 0.0, -1
        for step, batch in enumerate(data):
            inputs, targets = as_pair(batch)
            inputs = place(inputs, self.device, channels_last=self.channels_last)
            targets = to_device(targets, self.device)
            rate = learning_rate(
                epoch * self.steps + step, config.epochs * self.steps, peak=config.lr, warmup=config.warmup
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext():
                value = self.loss(self.model, inputs, targets)
            if step % check_every == 0:
                self._check_loss(value, epoch, step, rate)
            value.backward()
            if config.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total += value.detach()
            self.progress.advance(value.detach())
        if step < 0:
            peek(())  # an epoch without batches is the same error wherever it comes
        self._check_loss(total, epoch, step, rate)
        return total.item() / (step + 1), rate

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


def _cross_entropy(config: TuneConfig) -> Loss:
    """Return the default loss: cross-entropy with label smoothing, in float32."""

    def loss(model: nn.Module, inputs: Any, targets: Any) -> Tensor:
        output = call_model(model, inputs)
        logits = output if isinstance(output, Tensor) else output.logits
        return F.cross_entropy(logits.float(), targets, label_smoothing=config.label_smoothing)

    return loss


def _state(run: _Run, identity: str, history: list[EpochRecord]) -> TuneState:
    return TuneState(config=run.config, identity=identity, steps=run.steps, history=tuple(history))


def _steps(batches: Batches, state: TuneState | None, folder: str | Path | None) -> int:
    """Return the number of steps in an epoch; raises CheckpointError where the stored run had another."""
    steps = count_steps(batches)
    if state and state.steps != steps:
        msg = f"{folder} holds a run of {state.steps} steps per epoch, not {steps}: other data. Use another folder."
        raise CheckpointError(msg)
    return steps
