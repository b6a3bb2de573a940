"""From options and the environment to many workers: for work that falls into layers, and for training."""

from __future__ import annotations

import copy
import dataclasses
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from tenfold.cli.terminal import Misuse
from tenfold.errors import require

if TYPE_CHECKING:
    from torch import nn

    from tenfold.cli.options import Machine
    from tenfold.cli.sources import Opened
    from tenfold.parallel import Workers

_PANEL = "Machine"


@dataclass(frozen=True)
class Spread:
    """Who does the work that falls into layers."""

    jobs: Annotated[
        int,
        typer.Option(
            "--jobs",
            "-j",
            min=1,
            metavar="N",
            help="Work on so many layers at a time; the outcome is the same.",
            rich_help_panel=_PANEL,
        ),
    ] = 1
    backend: Annotated[
        Literal["loky", "ray"],
        typer.Option(
            help="Where: in processes of this machine, or on a Ray cluster (that of RAY_ADDRESS, or one of its own).",
            rich_help_panel=_PANEL,
        ),
    ] = "loky"

    def workers(self, opened: Opened, machine: Machine) -> Workers | None:
        """Return the workers, each with the threads that were asked for or one; None for this process."""
        from tenfold.parallel import Workers

        workers = Workers(self.jobs, self.backend, machine.threads or 1)
        if workers.is_local:
            return None
        workers.send_along(sys.modules[type(opened.task).__module__])
        return workers


@dataclass(frozen=True, eq=False)
class Launch:
    """The processes of ``accelerate launch``: the main one does and writes everything, the others tune with it."""

    accelerator: Any

    @property
    def main(self) -> bool:
        """Whether this is the process that plans, measures and writes."""
        return bool(self.accelerator.is_main_process)

    def share(self, model: nn.Module) -> nn.Module:
        """Return the model in the main process, and a copy of it in the others, which wait for it."""
        from accelerate.utils import broadcast_object_list

        sent = broadcast_object_list([copy.deepcopy(model).cpu() if self.main else None])
        if self.main:
            return model
        received: nn.Module = sent[0]
        return received


def launched(machine: Machine) -> Launch | None:
    """Return the launch that this process is part of; None where it is alone."""
    if _processes() == 1:
        return None
    accelerate: Any = require("accelerate", "scale")
    # The others wait while the main process plans and fits, which may take longer than the usual half an hour.
    patient = accelerate.InitProcessGroupKwargs(timeout=timedelta(days=7))
    return Launch(accelerate.Accelerator(cpu=machine.device == "cpu", kwargs_handlers=[patient]))


def on_own_device(machine: Machine, launch: Launch | None) -> Machine:
    """Return the machine with the device of this process."""
    return machine if launch is None else dataclasses.replace(machine, device=str(launch.accelerator.device))


def refuse_launch(command: str) -> None:
    """Raise a usage error if several processes were launched for a command that is for one."""
    if _processes() > 1:
        msg = (
            f"tenfold {command} runs in one process, and {_processes()} were launched. Only compress and tune train in "
            "several; --jobs spreads other work."
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
