"""From options to a task and its model, ready on its device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold.cli.terminal import Misuse
from tenfold.errors import CheckpointError, TenfoldError, UnknownNameError, WeightError, first_line

if TYPE_CHECKING:
    from torch import nn

    from tenfold.cli.options import Machine, Source
    from tenfold.records import Plan, RunRecord
    from tenfold.tasks import Task


@dataclass(frozen=True, eq=False)
class Opened:
    """A task with its model; with the plan and the record behind the model if that is a compressed one.

    ``name`` is what ``load_task`` reads. ``given`` is the model as it was before its recurrent networks were opened for
    a plan; None where nobody opened any.
    """

    name: str
    task: Task
    model: nn.Module
    device: Any
    plan: Plan | None = None
    record: RunRecord | None = None
    given: nn.Module | None = None

    def inputs(self, batch_size: int = 1) -> Any:
        """Return example inputs on the device and in the floating point type of the model."""
        from tenfold.tracing import to_device
        from tenfold.tracing.contexts import dtype_of

        return to_device(self.task.example_inputs(batch_size), self.device, dtype_of(self.model))


def open_source(source: Source, machine: Machine) -> Opened:
    """Return the task and the model that the options name.

    Raises:
        TenfoldError: no such task, device, weights or checkpoint, or weights that are not finite.
    """
    if source.weights is not None and source.checkpoint is not None:
        msg = "give --weights (a dense model) or --checkpoint (a compressed one), not both."
        raise Misuse(msg)
    if source.task is None and source.checkpoint is None:
        msg = "which task? Give --task NAME[:VARIANT]; `tenfold list tasks` names them."
        raise Misuse(msg)
    from tenfold.checkpoint import load, read_record
    from tenfold.tasks import load_task

    device = _device(machine)
    record = read_record(source.checkpoint) if source.checkpoint is not None else None
    name = source.task or ""
    if not name and source.checkpoint is not None:
        name = _recorded_task(record, source.checkpoint)
    task = load_task(name, data=source.data, seed=machine.seed)
    plan = None
    if source.checkpoint is not None:
        model, plan = load(task.build(), source.checkpoint)
    else:
        model = task.dense(source.weights)
    _check_finite(model, source.checkpoint or source.weights or task.id)
    return Opened(name, task, model.to(device).eval(), device, plan, record)


def _device(machine: Machine) -> Any:
    """Return the device after trying it, with the threads set."""
    import torch

    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    try:
        device = torch.device(machine.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        msg = f"the device {machine.device!r} cannot be used: {first_line(error)}"
        raise TenfoldError(msg) from error
    return device


def _recorded_task(record: RunRecord | None, checkpoint: Path) -> str:
    """Return the task that a checkpoint was made for; only registered ones, since others run code of their own."""
    from tenfold.tasks import TASKS

    if record is not None and record.task is not None and record.task.partition(":")[0] in TASKS.names():
        return TASKS.get(record.task.partition(":")[0]).recorded(record.task, checkpoint)
    known = f" It was made for {record.task}, which runs code of its own." if record and record.task else ""
    msg = f"{checkpoint} does not say for which task it is.{known} Give --task."
    raise UnknownNameError(msg)


def _check_finite(model: nn.Module, where: object) -> None:
    import torch

    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            msg = f"{where}: {bad} of the {tensor.numel()} numbers in {name} are NaN or infinite. Repair them first."
            raise WeightError(msg)


def default_folder(opened: Opened) -> Path:
    """Return the folder for a compressed model where the user names none."""
    return Path(f"compressed-{opened.task.id.replace(':', '-')}")


def required_plan(opened: Opened) -> Plan:
    """Return the plan behind a compressed model; raises CheckpointError for a dense one."""
    if opened.plan is None:
        msg = "a compressed model is needed: give --checkpoint FOLDER, as `tenfold compress` wrote it"
        raise CheckpointError(msg)
    return opened.plan
