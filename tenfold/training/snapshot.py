"""Training checkpoints: the last complete epoch in one safetensors file, replaced atomically.

It holds everything that the next epoch depends on: parameters, buffers, their average and the state of the optimizer as
tensors; epoch, history and configuration as JSON in the header. Random states are left out: they are a function of the
seed and the epoch.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import PositiveInt
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tenfold.errors import CheckpointError, TenfoldError
from tenfold.records import Record, atomic_write
from tenfold.records.tuning import EpochRecord, TuneConfig
from tenfold.training.ema import Average

FILE_NAME = "tuning.safetensors"
HEADER = "tenfold.training"
VERSION = 1


class TuneState(Record):
    """Progress and identity of a run; ``as_dense`` is what was measured to be faster, which decides rounding."""

    version: PositiveInt = VERSION
    config: TuneConfig
    identity: str = ""
    steps: int
    processes: PositiveInt = 1
    as_dense: bool = False
    history: tuple[EpochRecord, ...] = ()


@dataclass(frozen=True)
class TrainingFolder:
    """A folder that stores the epochs of a run, and the identity of that run.

    Attributes:
        path: created if it does not exist.
        identity: what the run depends on besides its configuration, such as a digest of the plan; a folder of a run
            with another identity is refused.
    """

    path: str | Path
    identity: str = ""

    @classmethod
    def of(cls, folder: str | Path | TrainingFolder | None) -> TrainingFolder | None:
        """Return the folder, without an identity if it is a path."""
        return cls(folder) if isinstance(folder, str | Path) else folder

    def part(self, name: str, *facts: str) -> TrainingFolder:
        """Return a folder within this one, for a part of the run that depends on further facts."""
        return TrainingFolder(Path(self.path) / name, "; ".join(filter(None, (self.identity, *facts))))


class Snapshot:
    """The file of a run in its folder.

    Args:
        folder: of the run; a file of a run with another identity, configuration or number of processes is refused.
        config: of the run.
        processes: that train together.

    Raises:
        CheckpointError: the folder cannot be written to.
    """

    def __init__(self, folder: TrainingFolder, config: TuneConfig, processes: int = 1) -> None:
        self.folder, self.identity = Path(folder.path), folder.identity
        self.path = self.folder / FILE_NAME
        self.config, self.processes = config, processes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left_over in self.folder.glob(f".{FILE_NAME}.*"):  # by a kill
                shutil.rmtree(left_over)
            with tempfile.TemporaryFile(dir=self.folder):  # fail now rather than after the first epoch
                pass
        except OSError as error:
            msg = f"cannot write training checkpoints to {self.folder}: {error.strerror or error}. Use another one."
            raise CheckpointError(msg) from error

    def read(self) -> TuneState | None:
        """Return the stored state; None if there is none yet.

        Raises:
            CheckpointError: the file is damaged, foreign, of a newer version, or of another run.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                text = (file.metadata() or {}).get(HEADER, "")
            state = TuneState.from_text(text, source=str(self.path))
        except (SafetensorError, OSError, TenfoldError) as error:
            msg = f"{self.path} is not a readable training checkpoint ({error}). Delete it, or use another folder."
            raise CheckpointError(msg) from error
        if state.version > VERSION:
            msg = f"{self.path} has version {state.version}, this tenfold reads up to {VERSION}: upgrade tenfold"
            raise CheckpointError(msg)
        self._refuse_others(state)
        return state

    def state(self, steps: int, history: Sequence[EpochRecord], *, as_dense: bool = False) -> TuneState:
        """Return the state of the run after the epochs of the history."""
        return TuneState(
            config=self.config,
            identity=self.identity,
            steps=steps,
            processes=self.processes,
            as_dense=as_dense,
            history=tuple(history),
        )

    def check_steps(self, state: TuneState, steps: int) -> None:
        """Raise CheckpointError if the stored run has another number of steps per epoch."""
        if state.steps != steps:
            msg = (
                f"{self.folder} holds a run of {state.steps} steps per epoch, not {steps}: other data. "
                "Use another folder."
            )
            raise CheckpointError(msg)

    def restore(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, average: Average | None = None
    ) -> None:
        """Restore the model, and optimizer and average if training continues.

        Without an optimizer the run is finished: the model gets the average, if there is one.

        Raises:
            CheckpointError: the model has other tensors than the stored one, and is left unchanged.
        """
        try:
            with safe_open(self.path, framework="pt") as file:
                stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 — no mapping
        except (SafetensorError, OSError) as error:
            msg = f"{self.path} is damaged ({error}). Delete it, or use another folder."
            raise CheckpointError(msg) from error
        here = {f"model/{name}": tensor for name, tensor in _model_tensors(model)}
        there = {name: tensor for name, tensor in stored.items() if name.startswith("model/")}
        shapes = [{name: (t.shape, t.dtype) for name, t in tensors.items()} for tensors in (here, there)]
        odd = [name for name, _ in shapes[0].items() ^ shapes[1].items()]
        if odd:
            msg = (
                f"{self.path} is of another model: {len(set(odd))} tensors differ in name, shape or dtype, such as "
                f"{min(odd).removeprefix('model/')!r}. Use another folder."
            )
            raise CheckpointError(msg)
        if optimizer is not None:
            self._restore_optimizer(model, optimizer, stored)
        averages = {n.removeprefix("average/"): t for n, t in stored.items() if n.startswith("average/")}
        if average is not None:
            self._check_averages(averages.keys() ^ average.tensors.keys())
        with torch.no_grad():
            for name, tensor in here.items():
                tensor.copy_(there[name])
            if optimizer is None:
                for name, value in averages.items():
                    here[f"model/{name}"].copy_(value)
            elif average is not None:
                for name, tensor in average.tensors.items():
                    tensor.copy_(averages[name])

    def write(
        self, state: TuneState, model: nn.Module, optimizer: torch.optim.Optimizer, average: Average | None = None
    ) -> None:
        """Store the run in place of the former epoch.

        Raises:
            CheckpointError: the file cannot be written; the former one is still there.
        """
        tensors = {f"model/{name}": tensor for name, tensor in _model_tensors(model)}
        tensors |= dict(_optimizer_tensors(model, optimizer))
        if average is not None:
            tensors |= {f"average/{name}": tensor for name, tensor in average.tensors.items()}
        tensors = {
            n: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for n, t in tensors.items()
        }
        try:
            with atomic_write(self.path) as partial:
                save_file(tensors, partial, metadata={HEADER: state.model_dump_json()})
                with partial.open("rb+") as file:
                    os.fsync(file.fileno())
        except (OSError, SafetensorError) as error:
            msg = f"cannot write {self.path}: {error}. The epoch before is still there."
            raise CheckpointError(msg) from error

    def _refuse_others(self, state: TuneState) -> None:
        theirs, ours = state.config.model_dump(), self.config.model_dump()
        changes = [f"{k} was {theirs[k]}, is {ours[k]}" for k in ours if theirs[k] != ours[k]]
        if state.identity != self.identity:
            changes.append(f"identity was {state.identity!r}, is {self.identity!r}")
        if state.processes != self.processes:
            changes.append(f"processes were {state.processes}, are {self.processes}")
        if changes:
            msg = f"{self.folder} holds another training run: {'; '.join(changes)}. Use another folder."
            raise CheckpointError(msg)

    def _check_averages(self, unmatched: set[str]) -> None:
        if unmatched:
            odd = min(unmatched)
            msg = f"{self.path} averaged other tensors than are trained now, such as {odd!r}. Use another folder."
            raise CheckpointError(msg)

    def _restore_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer, stored: dict[str, Tensor]) -> None:
        names = {parameter: name for name, parameter in model.named_parameters()}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        index = {names[p]: i for i, p in enumerate(parameters)}
        states: dict[int, dict[str, Tensor]] = {}
        for key, value in stored.items():
            kind, _, rest = key.partition("/")
            if kind != "optimizer":
                continue
            name, _, entry = rest.rpartition("/")
            if name not in index:
                msg = f"{self.path} trained {name!r}, which does not require grad now. Use another folder."
                raise CheckpointError(msg)
            states.setdefault(index[name], {})[entry] = _laid_out_like(parameters[index[name]], value)
        optimizer.load_state_dict({**optimizer.state_dict(), "state": states})


def _model_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers, each once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Yield the state of the optimizer by name of the parameter."""
    for name, parameter in model.named_parameters():
        for entry, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                yield f"optimizer/{name}/{entry}", value


def _laid_out_like(parameter: Tensor, value: Tensor) -> Tensor:
    """Return the value with the strides of the parameter: fused optimizers iterate over both in memory order."""
    if value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
