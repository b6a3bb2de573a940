"""Who else trains: nobody, or the other processes of a Hugging Face Accelerate launch. The loop is the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tenfold.errors import CheckpointError, TuningError
from tenfold.tracing.contexts import device_of

if TYPE_CHECKING:
    from accelerate import Accelerator

Prepared = tuple[nn.Module, torch.optim.Optimizer]


class Alone:
    """One process that trains with plain torch."""

    index = 0
    count = 1
    casts = False  # whether it has a precision of its own to compute in

    def place(self, model: nn.Module) -> torch.device:
        """Return the device to train on: where the model is."""
        return device_of(model)

    def prepared(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> AbstractContextManager[Prepared]:
        """Yield what to call in place of the model, and what to step in place of the optimizer."""
        return nullcontext((model, optimizer))

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute in the precision of the process meanwhile."""
        return nullcontext()

    def unsynced(self, called: nn.Module) -> AbstractContextManager[Any]:
        """Leave gradients unshared meanwhile: more are to be added to them."""
        del called
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss."""
        loss.backward()

    def clip(self, parameters: list[nn.Parameter], norm: float) -> None:
        """Scale the whole gradient down to this norm if it is larger."""
        torch.nn.utils.clip_grad_norm_(parameters, norm)

    def mean(self, value: Tensor) -> float:
        """Return the mean over all processes."""
        return value.item()

    def from_main(self, value: float) -> float:
        """Return the value of the main process."""
        return value

    def align_(self, model: nn.Module) -> None:
        """Give the model the buffers of the main process: running statistics differ, parameters do not."""

    def agree(self, done: int, folder: object) -> None:
        """Wait for all; raise CheckpointError if they have not found the same epochs in the folder."""

    def wait(self) -> None:
        """Wait for all processes."""


class Accelerated(Alone):
    """One of the processes of an ``accelerate.Accelerator``, which decides on devices, precision and how to share.

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
        self.casts = accelerator.mixed_precision != "no"

    def place(self, model: nn.Module) -> torch.device:
        """Return the device of the process after moving the model there."""
        if not self.accelerator.device_placement:
            return device_of(model)
        model.to(self.accelerator.device)
        return self.accelerator.device  # type: ignore[no-any-return]

    @contextmanager
    def prepared(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Prepared]:
        """Yield model and optimizer as the accelerator wraps them; afterwards neither knows of the other."""
        own = set(vars(model))
        called, stepped = self.accelerator.prepare(model, optimizer)
        try:
            yield called, stepped
        finally:
            for made, known in ((called, self.accelerator._models), (stepped, self.accelerator._optimizers)):  # noqa: SLF001 - free_memory would drop what the caller prepared too
                known[:] = [other for other in known if other is not made]
            for name in {"forward", "_original_forward", "_is_accelerate_prepared"} - own:
                vars(model).pop(name, None)

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute in the precision of the accelerator meanwhile."""
        return self.accelerator.autocast()  # type: ignore[no-any-return]

    def unsynced(self, called: nn.Module) -> AbstractContextManager[Any]:
        """Leave gradients unshared meanwhile: more are to be added to them."""
        return self.accelerator.no_sync(called)  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss, scaled where the precision needs it; the last of a step are averaged."""
        self.accelerator.backward(loss)

    def clip(self, parameters: list[nn.Parameter], norm: float) -> None:
        """Scale the whole gradient, averaged over the processes, down to this norm if it is larger."""
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

    def align_(self, model: nn.Module) -> None:
        """Give the model the buffers of the main process: running statistics differ, parameters do not."""
        from accelerate.utils import broadcast

        with torch.no_grad():
            for buffer in model.buffers():
                buffer.copy_(broadcast(buffer))

    def agree(self, done: int, folder: object) -> None:
        """Wait for all; raise CheckpointError if they have not found the same epochs in the folder."""
        found: Tensor = self.accelerator.gather(torch.tensor([done], device=self.accelerator.device))
        if len(set(found.tolist())) > 1:
            msg = (
                f"the processes find {', '.join(map(str, found.tolist()))} epochs in {folder}: give a folder on a file "
                "system that all machines share."
            )
            raise CheckpointError(msg)

    def wait(self) -> None:
        """Wait for all processes."""
        self.accelerator.wait_for_everyone()
