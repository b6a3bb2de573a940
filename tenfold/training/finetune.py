"""Supervised fine-tuning, resumable after a kill with bit-identical results."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from tenfold.progress import in_words
from tenfold.records.tuning import EpochRecord, TuneConfig, TuneResult
from tenfold.tracing.contexts import kept_modes, same_random_numbers
from tenfold.tracing.held_tensors import leave_inference_
from tenfold.tracing.inputs import to_device
from tenfold.training.as_dense import faster_as_dense
from tenfold.training.batches import Batch, Batches, at_epoch, count_steps, peek, seed_epoch, share
from tenfold.training.distributed import AccelerateProcess, SingleProcess
from tenfold.training.ema import Average
from tenfold.training.loop import Evaluate, Loop, Loss
from tenfold.training.losses import cross_entropy
from tenfold.training.optimizer import build_optimizer
from tenfold.training.precision import channels_last_weights, uses_channels_last
from tenfold.training.snapshot import Snapshot, TrainingFolder
from tenfold.training.tune_progress import TuneProgress

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("tenfold")


def finetune(
    model: nn.Module,
    batches: Batches,
    config: TuneConfig | None = None,
    *,
    loss: Loss | None = None,
    evaluate: Evaluate | None = None,
    folder: str | Path | TrainingFolder | None = None,
    progress: TuneProgress | None = None,
    accelerator: Accelerator | None = None,
) -> TuneResult:
    """Train a model in place and return the history.

    Use it to win back accuracy after ``compress`` where you have no training loop of your own: any loop will do.

    With a ``folder``, every complete epoch is stored. The same call with the same folder resumes after the last
    complete epoch, in a new process too, and ends, on the same CPU, bit for bit where an uninterrupted run ends; a run
    that is finished returns at once. What is not stored is a function of the epoch: the learning rate, and torch's
    global generators, which are reseeded for each epoch and restored afterwards. A DataLoader that shuffles with a
    generator of its own resumes wherever that generator is: leave the generator out, or pass a function of the epoch.

    With an ``accelerator``, the processes of its launch train copies of the model together (DDP): each takes its share
    of the batches, so that a step sees as many batches as there are processes, and gradients are averaged. All must be
    given the same model and the same batches, and a folder on a shared file system, to which the main process writes.
    All end with the same model, which has the running statistics of the main process.

    Train modes, ``requires_grad`` and memory layouts are restored at the end, and gradients are None.

    Args:
        model: trained in place on its own device, in train mode.
        batches: function from the epoch (counted from 0) to an iterable of (inputs, targets), or an iterable that can
            be repeated. Inputs as ``call_model`` takes them. Without ``len``, epoch 0 is iterated once to count steps.
        config: ``TuneConfig()`` by default.
        loss: maps (model, inputs, targets) to a scalar; smoothed cross-entropy of ``model(inputs)`` (or of its
            ``logits``) by default. Add a teacher or a penalty here. With an accelerator it is given the wrapped model,
            whose gradients are averaged.
        evaluate: maps the model, in eval mode and without gradients, to a score after each epoch. Every process calls
            it; the score of the main process counts.
        folder: where to store the epochs, with the identity of the run if it has one; nowhere by default.
        progress: callbacks in the main process, such as ``RichProgress()`` or ``TuneProgress(on_epoch=print)``.
        accelerator: an ``accelerate.Accelerator()``: its device, precision and processes; this process alone if None.

    Raises:
        TuningError: nothing requires grad, or loss or weights are no longer finite; an accelerator that is set up for
            models in pieces (FSDP, DeepSpeed) or accumulates gradients itself.
        DataError: no batches, or batches that are not pairs.
        CheckpointError: a folder that is not writable, or holds a damaged file or another run.
        FileError: another process trains in the folder, or the disk is full.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> x = torch.randn(64, 2)
        >>> result = finetune(model, [(x, (x[:, 0] > 0).long())], TuneConfig(epochs=20, lr=0.5))
        >>> result.history[-1].loss < result.history[0].loss
        True
    """
    config, folder = config or TuneConfig(), TrainingFolder.of(folder)
    processes = SingleProcess() if accelerator is None else AccelerateProcess(accelerator)
    progress = progress if progress is not None and processes.index == 0 else TuneProgress()
    if folder is None:
        return _train(model, batches, config, loss, evaluate, None, progress, processes)
    snapshot = Snapshot(folder, config, processes.count)
    with snapshot.in_use() if processes.index == 0 else nullcontext():
        return _train(model, batches, config, loss, evaluate, snapshot, progress, processes)


def _train(
    model: nn.Module,
    batches: Batches,
    config: TuneConfig,
    loss: Loss | None,
    evaluate: Evaluate | None,
    snapshot: Snapshot | None,
    progress: TuneProgress,
    processes: SingleProcess,
) -> TuneResult:
    """Train from where the snapshot says; see ``finetune``."""
    stored = snapshot.read() if snapshot else None
    history = list(stored.state.history) if stored else []
    done, chosen = len(history), stored.state.as_dense if stored else None
    processes.check_same_epochs(done, None if snapshot is None else snapshot.folder)
    if done and snapshot and processes.index == 0:
        logger.info("resuming after epoch %d of %d from %s", done, config.epochs, snapshot.folder)
    if done >= config.epochs:
        if snapshot and stored:
            snapshot.restore(stored.tensors, model)
        return TuneResult(config=_settled(config, dense=chosen), history=tuple(history), resumed=done)

    device = processes.place(leave_inference_(model))
    with same_random_numbers(device), kept_modes(model):
        steps = -(-count_steps(batches) // processes.count)
        if snapshot and stored:
            snapshot.check_steps(stored.state, steps)
        first, data = peek(_epoch_data(batches, done, config, device, processes))
        layout = uses_channels_last(model, to_device(first[0], device), config.channels_last)
        average = None if config.ema is None else Average(model, config.ema)
        with (
            channels_last_weights(model, enabled=layout),
            processes.prepared(model, plain := build_optimizer(model, config)) as (called, optimizer),
        ):
            if snapshot and stored:
                snapshot.restore(stored.tensors, model, plain, average)
                stored = None  # all of it is copied
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
            dense = _as_dense(loop, first) if chosen is None else chosen
            progress.start(epochs=config.epochs, steps=steps, done=done)
            try:
                for epoch in range(done, config.epochs):
                    if epoch > done:
                        data = _epoch_data(batches, epoch, config, device, processes)
                    history.append(loop.epoch(epoch, data, evaluate, dense=dense))
                    if snapshot and processes.index == 0:
                        snapshot.write(snapshot.state(steps, history, as_dense=dense), model, plain, average)
                    processes.wait()
                    _log(history[-1], config, processes)
                    progress.end_epoch(history[-1])
            finally:
                optimizer.zero_grad(set_to_none=True)
                progress.stop()
        if average is not None:
            average.write_to_(model)
            processes.sync_buffers_(model)
    return TuneResult(config=_settled(config, dense=dense), history=tuple(history), resumed=done)


def _settled(config: TuneConfig, *, dense: bool | None) -> TuneConfig:
    """Return the settings with what was measured in place of "auto": with these a run repeats to the last bit."""
    if config.train_as != "auto" or dense is None:
        return config
    return config.replace(train_as="dense" if dense else "factors")


def _log(epoch: EpochRecord, config: TuneConfig, processes: SingleProcess) -> None:
    if processes.index == 0:
        score = "" if epoch.score is None else f", score {epoch.score:.4g}"
        left = epoch.seconds * (config.epochs - epoch.epoch)
        more = f", about {in_words(left)} left" if left > 1 else ""
        place = f"{epoch.epoch}/{config.epochs}"
        logger.info("epoch %s: loss %.4f%s, %.1f s%s", place, epoch.loss, score, epoch.seconds, more)


def _as_dense(loop: Loop, batch: Batch) -> bool:
    """Return whether to multiply factors out, the same in all processes."""
    if loop.config.train_as != "auto":
        return loop.config.train_as == "dense"
    faster = loop.processes.index == 0 and faster_as_dense(loop.model, lambda model: loop.loss_of(model, batch))
    return bool(loop.processes.from_main(float(faster)))


def _epoch_data(
    batches: Batches, epoch: int, config: TuneConfig, device: torch.device, processes: SingleProcess
) -> Iterable[Batch]:
    """Seed the generators for an epoch and return its batches for this process."""
    seed_epoch(device, config.seed, epoch)
    data = at_epoch(batches, epoch)
    if processes.count == 1:
        return data
    data = share(data, processes.index, processes.count)
    seed_epoch(device, config.seed, epoch, processes.index)  # so that dropout differs from process to process
    return data
