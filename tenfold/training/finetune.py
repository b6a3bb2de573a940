"""Fine-tuning on a page: supervised, resumable after a kill, and the same to the last bit when it is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from tenfold.errors import CheckpointError
from tenfold.tracing.contexts import kept_modes, same_random_numbers
from tenfold.tracing.inputs import to_device
from tenfold.training.batches import Batch, Batches, at_epoch, count_steps, peek, seed_epoch, share
from tenfold.training.config import EpochRecord, TuneConfig, TuneResult
from tenfold.training.distributed import Accelerated, Alone
from tenfold.training.ema import Average
from tenfold.training.loop import Loop, Loss
from tenfold.training.losses import cross_entropy
from tenfold.training.optimizer import build_optimizer
from tenfold.training.precision import channels_last_weights, uses_channels_last
from tenfold.training.progress import Silent, TuneProgress
from tenfold.training.snapshot import Snapshot, TuneState

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("tenfold")


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
    accelerator: Accelerator | None = None,
) -> TuneResult:
    """Return the history of training the model in place.

    With a ``folder``, every complete epoch is stored in it. The same call with the same folder goes on after the last
    complete epoch, in a new process too, and ends, on the same CPU, bit for bit where an uninterrupted run ends; a run
    that is finished returns at once. What is not stored is made a function of the epoch: the learning rate, and torch's
    global generators, which are seeded anew for each epoch and given back to the caller as they were. A DataLoader that
    shuffles with a generator of its own goes on from wherever that is: leave it out, or pass a function of the epoch.

    With an ``accelerator``, the processes of its launch train copies of the model together (DDP): each takes its share
    of the batches, so that a step is on as many batches as there are processes, and gradients are averaged. All must be
    given the same model and the same batches, and a folder that all of them see, to which the main process writes. All
    end with the same model, which has the running statistics of the main process.

    Afterwards train modes, ``requires_grad`` and memory layouts are as they were, and gradients are None.

    Args:
        model: trained in place on its own device, in train mode.
        batches: function from the epoch (counted from 0) to an iterable of (inputs, targets), or something that can
            be gone through once per epoch. Inputs as ``call_model`` takes them. Without ``len``, epoch 0 is gone
            through once just to count the steps.
        config: how to train; ``TuneConfig()`` if left out.
        loss: maps (model, inputs, targets) to a scalar; smoothed cross-entropy of ``model(inputs)`` (or of its
            ``logits``) by default. A teacher, or a penalty, comes in here. With an accelerator it is given the wrapped
            model, whose gradients are averaged.
        evaluate: gives the model, in eval mode and without gradients, a score after each epoch. Each process calls it;
            that of the main process counts.
        folder: where to store the epochs; nowhere by default.
        identity: what the run is about, in any words, such as a digest of the plan; a folder of another is refused.
        on_epoch: told of each epoch when it is complete and stored, in the main process.
        progress: told of each step, such as a ``RichProgress()``, in the main process.
        accelerator: an ``accelerate.Accelerator()``: its device, precision and processes; this process alone if None.

    Raises:
        TuningError: nothing requires grad, or loss or weights are no longer finite; an accelerator that is set up for
            models in pieces (FSDP, DeepSpeed) or accumulates gradients itself.
        DataError: no batches, or batches that are not pairs.
        CheckpointError: a folder that is not writable, or holds a damaged file or another run.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> x = torch.randn(64, 2)
        >>> result = finetune(model, [(x, (x[:, 0] > 0).long())], TuneConfig(epochs=20, lr=0.5))
        >>> result.history[-1].loss < result.history[0].loss
        True
    """
    config, processes = config or TuneConfig(), Alone() if accelerator is None else Accelerated(accelerator)
    progress = progress if progress is not None and processes.index == 0 else Silent()
    snapshot = Snapshot(folder, config, identity, processes.count) if folder is not None else None
    state = snapshot.read() if snapshot else None
    history = list(state.history) if state else []
    done = len(history)
    processes.agree(done, folder)
    if done and processes.index == 0:
        logger.info("resuming after epoch %d of %d from %s", done, config.epochs, folder)
    if done >= config.epochs:
        if snapshot and done:
            snapshot.restore(model)
        return TuneResult(config=config, history=tuple(history), resumed=done)

    device = processes.place(model)
    with same_random_numbers(device), kept_modes(model):
        steps = _steps(batches, state, folder, processes.count)
        first, data = peek(_epoch_data(batches, done, config, device, processes))
        layout = uses_channels_last(model, to_device(first, device), config.channels_last)
        average = None if config.ema is None else Average(model, config.ema)
        with (
            channels_last_weights(model, enabled=layout),
            processes.prepared(model, plain := build_optimizer(model, config)) as (called, optimizer),
        ):
            if snapshot and state:
                snapshot.restore(model, plain, average)
            loop = Loop(
                model=model,
                called=called,
                optimizer=optimizer,
                config=config,
                loss=loss or cross_entropy(config.label_smoothing),
                device=device,
                channels_last=layout,
                steps=steps,
                progress=progress,
                processes=processes,
                average=average,
            )
            progress.start(epochs=config.epochs, steps=steps, done=done)
            try:
                for epoch in range(done, config.epochs):
                    if epoch > done:
                        data = _epoch_data(batches, epoch, config, device, processes)
                    history.append(loop.epoch(epoch, data, evaluate))
                    if snapshot and processes.index == 0:
                        now = TuneState(
                            config=config,
                            identity=identity,
                            steps=steps,
                            processes=processes.count,
                            history=tuple(history),
                        )
                        snapshot.write(now, model, plain, average)
                    processes.wait()
                    progress.end_epoch(history[-1])
                    if on_epoch and processes.index == 0:
                        on_epoch(history[-1])
            finally:
                optimizer.zero_grad(set_to_none=True)
                progress.stop()
        if average is not None:
            average.write_to_(model)
            processes.align_(model)
    return TuneResult(config=config, history=tuple(history), resumed=done)


def _epoch_data(
    batches: Batches, epoch: int, config: TuneConfig, device: torch.device, processes: Alone
) -> Iterable[Batch]:
    """Return the batches of an epoch that this process trains on, with its random state set for them."""
    seed_epoch(device, config.seed, epoch)
    data = at_epoch(batches, epoch)
    if processes.count == 1:
        return data
    mine = share(data, processes.index, processes.count)
    seed_epoch(device, config.seed, epoch, processes.index)  # so that dropout differs from process to process
    return mine


def _steps(batches: Batches, state: TuneState | None, folder: str | Path | None, processes: int) -> int:
    """Return the number of batches for each process; raises CheckpointError where the stored run had another."""
    steps = -(-count_steps(batches) // processes)
    if state and state.steps != steps:
        msg = f"{folder} holds a run of {state.steps} steps per epoch, not {steps}: other data. Use another folder."
        raise CheckpointError(msg)
    return steps
