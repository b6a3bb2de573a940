"""One training loop for a single process and for the processes of a Hugging Face Accelerate launch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tenfold.errors import CheckpointError, TuningError
from tenfold.tracing.contexts import device_of

if TYPE_CHECKING:
    from accelerate import Accelerator


Prepared = tuple[nn.Module, torch.optim.Optimizer]


class SingleProcess:
    """Training in one process with plain torch."""

    index = 0
    count = 1
    sets_precision = False  # whether the launcher configures autocast

    def place(self, model: nn.Module) -> torch.device:
        """Return the device to train on: that of the model."""
        return device_of(model)

    def prepared(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> AbstractContextManager[Prepared]:
        """Yield the model to call and the optimizer to step, wrapped if necessary."""
        return nullcontext((model, optimizer))

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute in the precision that the launcher sets."""
        return nullcontext()

    def no_sync(self, called: nn.Module) -> AbstractContextManager[Any]:
        """Skip averaging of gradients over processes: more are to be accumulated."""
        del called
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss."""
        loss.backward()

    def clip(self, parameters: list[nn.Parameter], norm: float) -> None:
        """Clip the norm of the whole gradient."""
        torch.nn.utils.clip_grad_norm_(parameters, norm)

    def mean(self, value: Tensor) -> float:
        """Return the mean over all processes."""
        return value.item()

    def from_main(self, value: float) -> float:
        """Return the value of the main process."""
        return value

    def sync_buffers_(self, model: nn.Module) -> None:
        """Copy buffers from the main process: running statistics differ, parameters do not."""

    def check_same_epochs(self, done: int, folder: Path | None) -> None:
        """Raise CheckpointError unless all processes found the same number of epochs in the folder."""

    def wait(self) -> None:
        """Wait for all processes."""


class AccelerateProcess(SingleProcess):
    """One process of an ``accelerate.Accelerator``, which sets devices, precision and communication.

    Raises:
        TuningError: an accelerator that is set up for what the loop does itself, or for sharded models.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        steps, kind = accelerator.gradient_accumulation_steps, accelerator.distributed_type.value
        if steps != 1:
            msg = f"the accelerator accumulates {steps} gradients. Leave that to TuneConfig(accumulate={steps})."
            raise TuningError(msg)
        if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA"):
            msg = (
                f"finetune trains whole models, one in each process, and the accelerator is set up for {kind}. Launch "
                "without it, or train by a loop of your own: a compressed model is an ordinary module."
            )
            raise TuningError(msg)
        self.accelerator = accelerator
        self.index = accelerator.process_index
        self.count = accelerator.num_processes
        self.sets_precision = accelerator.mixed_precision != "no"

    def place(self, model: nn.Module) -> torch.device:
        """Move the model to the device of the process, and return the device."""
        if not self.accelerator.device_placement:
            return device_of(model)
        model.to(self.accelerator.device)
        return self.accelerator.device  # type: ignore[no-any-return]

    @contextmanager
    def prepared(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Prepared]:
        """Yield model and optimizer as the accelerator wraps them; unwrap both at the end."""
        before = set(vars(model))
        called, stepped = self.accelerator.prepare(model, optimizer)
        try:
            yield called, stepped
        finally:
            for wrapped, known in ((called, self.accelerator._models), (stepped, self.accelerator._optimizers)):  # noqa: SLF001 - free_memory would drop what the caller prepared too
                known[:] = [other for other in known if other is not wrapped]
            for name in {"forward", "_original_forward", "_is_accelerate_prepared"} - before:
                vars(model).pop(name, None)

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute in the precision of the accelerator."""
        return self.accelerator.autocast()  # type: ignore[no-any-return]

    def no_sync(self, called: nn.Module) -> AbstractContextManager[Any]:
        """Skip averaging of gradients over processes: more are to be accumulated."""
        return self.accelerator.no_sync(called)  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss, scaled where the precision needs it; averaged at the last of a step."""
        self.accelerator.backward(loss)

    def clip(self, parameters: list[nn.Parameter], norm: float) -> None:
        """Clip the norm of the whole gradient, averaged over the processes."""
        self.accelerator.clip_grad_norm_(parameters, norm)

    def mean(self, value: Tensor) -> float:
        """Return the mean over all processes."""
        mean: Tensor = self.accelerator.reduce(value, "mean")
        return mean.item()

    def from_main(self, value: float) -> float:
        """Return the value of the main process."""
        from accelerate.utils import broadcast

        sent: Tensor = broadcast(torch.tensor(value, dtype=torch.float64, device=self.accelerator.device))
        return sent.item()

    def sync_buffers_(self, model: nn.Module) -> None:
        """Copy buffers from the main process: running statistics differ, parameters do not."""
        from accelerate.utils import broadcast

        with torch.no_grad():
            for buffer in model.buffers():
                buffer.copy_(broadcast(buffer))

    def check_same_epochs(self, done: int, folder: Path | None) -> None:
        """Raise CheckpointError unless all processes found the same number of epochs in the folder."""
        counts: list[int] = self.accelerator.gather(torch.tensor([done], device=self.accelerator.device)).tolist()
        if folder is not None and len(set(counts)) > 1:
            msg = (
                f"the processes find {', '.join(map(str, counts))} epochs in {folder}: give a folder on a file "
                "system that all machines share."
            )
            raise CheckpointError(msg)

    def wait(self) -> None:
        """Wait for all processes."""
        self.accelerator.wait_for_everyone()
