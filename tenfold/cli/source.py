"""From options to a task and its model, ready on its device."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import PositiveInt

from tenfold.cli.terminal import Misuse, Options
from tenfold.diagnosis import trouble
from tenfold.errors import CheckpointError, TenfoldError, UnknownNameError, first_line

if TYPE_CHECKING:
    from torch import nn

    from tenfold.parallel import Workers
    from tenfold.planning import Score
    from tenfold.records import Plan, RunRecord
    from tenfold.tasks import Task

Folder = Annotated[Path | None, "FOLDER"]


class Source(Options):
    """Model and data.

    Attributes:
        task: a model, its data, its score: NAME[:VARIANT], pkg.module:Class or file.py:Class; or a model alone:
            timm:NAME, torchvision:NAME, hf:FOLDER_OR_ID; or a language model with texts, lm:FOLDER_OR_ID. See `tenfold
            list tasks`. May be left out with a --checkpoint that knows it.
        weights: weights of the dense model, as .safetensors; with hf: and lm: also a folder.
        checkpoint: a compressed model, as `compress` wrote it.
        data: where the data is; else $TENFOLD_DATA, else ~/.cache/tenfold/datasets. With timm: and torchvision: a
            folder of pictures to calibrate with, with hf: a text file, a sentence a line (or pictures), with lm: a text
            file, or a folder with train.txt, test.txt and further texts.
    """

    task: str | None = None
    weights: Path | None = None
    checkpoint: Folder = None
    data: Folder = None


class Machine(Options):
    """Machine.

    Attributes:
        device: cpu, cuda, cuda:1, mps ...
        threads: CPU threads; as many as torch chooses.
    """

    device: str = "cpu"
    threads: PositiveInt | None = None


class Cluster(Machine):
    """Machine.

    Attributes:
        jobs: work on so many layers at a time; the result is the same.
        backend: where: in processes of this machine, or on a Ray cluster (that of RAY_ADDRESS, or one of its own).
    """

    jobs: PositiveInt = 1
    backend: Literal["loky", "ray"] = "loky"

    def workers(self, opened: Opened) -> Workers:
        """Return who does what falls into layers, each with the threads that were asked for or one."""
        from tenfold.parallel import Workers

        workers = Workers(self.jobs, self.backend, self.threads or 1)
        if not workers.is_local:
            workers.send_along(sys.modules[type(opened.task).__module__])
        return workers


@dataclass(frozen=True, eq=False)
class Opened:
    """A task with its model, which is built, loaded or trained when it is first asked for.

    Attributes:
        name: what ``load_task`` reads.
        task: that it names.
        device: of the model.
        source: the options.
        record: of a compressed model, if it has one.
    """

    name: str
    task: Task
    device: Any
    source: Source
    record: RunRecord | None = None

    @property
    def model(self) -> nn.Module:
        """The model, in eval mode on its device."""
        return self._loaded[0]

    @property
    def plan(self) -> Plan:
        """The plan behind a compressed model; raises CheckpointError for a dense one."""
        plan = self._loaded[1]
        if plan is None:
            msg = "a compressed model is needed: give --checkpoint FOLDER, as `tenfold compress` wrote it"
            raise CheckpointError(msg)
        return plan

    @property
    def score(self) -> Score:
        """The score of models on the test set, with what it is."""
        from tenfold.planning import Score

        return Score(self.task.evaluate, metric=self.task.metric)

    @cached_property
    def _loaded(self) -> tuple[nn.Module, Plan | None]:
        from tenfold.checkpoint import load, read_record
        from tenfold.tensors.finite import check_finite

        plan, source = None, self.source
        if source.checkpoint is not None:
            model, plan = load(self.task.build(), source.checkpoint)
            if str(read_record(source.checkpoint)) != str(self.record):
                msg = f"{source.checkpoint} was replaced while it was opened: give the command again"
                raise CheckpointError(msg)
        else:
            model = self.task.dense(source.weights)
        check_finite(model, source.checkpoint or source.weights or self.task.id)
        return model.to(self.device).eval(), plan

    def inputs(self, batch_size: int = 1) -> Any:
        """Return example inputs on the device and in the floating point type of the model."""
        from tenfold.tracing import to_device
        from tenfold.tracing.contexts import dtype_of

        return to_device(self.task.example_inputs(batch_size), self.device, dtype_of(self.model))

    @property
    def default_folder(self) -> Path:
        """The folder for a compressed model where the user names none."""
        return Path(f"compressed-{self.task.id.replace(':', '-')}")


def open_source(source: Source, machine: Machine, seed: int) -> Opened:
    """Return the task and the model that the options name.

    Raises:
        TenfoldError: no such task, device, weights or checkpoint.
    """
    if source.weights is not None and source.checkpoint is not None:
        msg = "give --weights (a dense model) or --checkpoint (a compressed one), not both."
        raise Misuse(msg)
    if source.task is None and source.checkpoint is None:
        msg = "which task? Give --task NAME[:VARIANT]; `tenfold list tasks` names them."
        raise Misuse(msg)
    if source.checkpoint is not None and not source.checkpoint.is_dir():
        msg = f"there is no checkpoint at {source.checkpoint}: name a folder that `tenfold compress` wrote"
        raise CheckpointError(msg)
    if source.weights is not None and not source.weights.expanduser().exists():
        msg = f"there is no weights file {source.weights}"  # said before the data are read
        raise CheckpointError(msg)
    from tenfold.checkpoint import read_record
    from tenfold.tasks import load_task

    device = _device(machine)
    record = read_record(source.checkpoint) if source.checkpoint is not None else None
    name = source.task or _recorded_task(record, source.checkpoint or Path())
    return Opened(name, load_task(name, data=source.data, seed=seed), device, source, record)


def _device(machine: Machine) -> Any:
    """Return the device after trying it, with the threads set."""
    import torch

    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    try:
        device = torch.device(machine.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        msg = f"the device {machine.device!r} cannot be used: {trouble(error) or first_line(error)}"
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
