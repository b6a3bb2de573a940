"""The processes of ``accelerate launch``, which train together."""

from __future__ import annotations

import copy
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from tenfold.cli.terminal import Misuse
from tenfold.errors import require

if TYPE_CHECKING:
    from torch import nn

    from tenfold.cli.source import Machine


@dataclass(frozen=True, eq=False)
class Launch:
    """The processes of a launch: the main one does and writes everything, the others tune with it.

    Attributes:
        accelerator: of this process; None where it is alone.
    """

    accelerator: Any = None

    @property
    def main(self) -> bool:
        """Whether this is the process that plans, measures and writes."""
        return self.accelerator is None or bool(self.accelerator.is_main_process)

    @property
    def processes(self) -> int:
        """How many there are."""
        return 1 if self.accelerator is None else int(self.accelerator.num_processes)

    def share(self, model: nn.Module) -> nn.Module:
        """Return the model in the main process, and a copy of it in the others, which wait for it."""
        if self.accelerator is None:
            return model
        from accelerate.utils import broadcast_object_list

        sent = broadcast_object_list([copy.deepcopy(model).cpu() if self.main else None])
        if self.main:
            return model
        received: nn.Module = sent[0]
        return received

    def own(self, machine: Machine) -> Machine:
        """Return the machine with the device of this process."""
        return machine if self.accelerator is None else machine.replace(device=str(self.accelerator.device))


def launched(machine: Machine) -> Launch:
    """Return the launch that this process is part of."""
    if _processes() == 1:
        return Launch()
    accelerate: Any = require("accelerate", "scale")
    # The others wait while the main process plans and fits, which may take longer than the usual half an hour.
    patient = accelerate.InitProcessGroupKwargs(timeout=timedelta(days=7))
    return Launch(accelerate.Accelerator(cpu=machine.device == "cpu", kwargs_handlers=[patient]))


def refuse_launch(command: str) -> None:
    """Raise a usage error if several processes were launched for a command that is for one."""
    if _processes() > 1:
        msg = (
            f"tenfold {command} runs in one process, and {_processes()} were launched. Only compress, stream and tune "
            "work in several; --jobs spreads other work."
        )
        raise Misuse(msg if os.environ.get("RANK", "0") == "0" else "see the main process")


def leave(code: int) -> NoReturn:
    """End this process, which is one of several without the interpreter's own end.

    After training in several processes, torch's threads for gloo live on, and now and then one of them aborts the
    interpreter as it ends (SIGABRT). The launcher would then end all others, whatever they were writing.
    """
    if _processes() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _processes() -> int:
    """Return how many processes ``accelerate launch`` or ``torchrun`` has started."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
