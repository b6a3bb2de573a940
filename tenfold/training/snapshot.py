"""The last complete epoch on disk: one safetensors file, replaced whole or not at all, and never unpickled.

Everything that the next epoch depends on is in it: parameters, buffers, their average and the state of the optimizer as
tensors; epoch, history and configuration as JSON in the header. Random states are not: they are a function of the seed
and the epoch.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from pydantic import PositiveInt
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tenfold.errors import CheckpointError, TenfoldError
from tenfold.records import Record, written_whole
from tenfold.training.config import EpochRecord, TuneConfig
from tenfold.training.ema import Average

FILE_NAME = "tuning.safetensors"
HEADER = "tenfold.training"
VERSION = 1


class TuneState(Record):
    """How far a run has come, and what run it is."""

    version: PositiveInt = VERSION
    config: TuneConfig
    identity: str = ""
    steps: int
    processes: PositiveInt = 1
    history: tuple[EpochRecord, ...] = ()


class Snapshot:
    """The file of a run in its folder.

    Args:
        folder: made if it does not exist.
        config: of the run; a folder of a run with another one is refused.
        identity: of the run, in the words of the caller; likewise.
        processes: that train together; likewise.

    Raises:
        CheckpointError: the folder cannot be written to.
    """

    def __init__(self, folder: str | Path, config: TuneConfig, identity: str = "", processes: int = 1) -> None:
        self.folder = Path(folder)
        self.path = self.folder / FILE_NAME
        self.config = config
        self.identity = identity
        self.processes = processes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left_over in self.folder.glob(f".{FILE_NAME}.*"):
                left_over.unlink()
            with tempfile.TemporaryFile(dir=self.folder):  # better to fail now than after the first epoch
                pass
        except OSError as error:
            msg = f"cannot write training checkpoints to {self.folder}: {error.strerror or error}. Use another one."
            raise CheckpointError(msg) from error

    def read(self) -> TuneState | None:
        """Return how far the run has come; None when there is nothing yet.

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

    def restore(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, average: Average | None = None
    ) -> None:
        """Write the stored tensors into the model, and into optimizer and average if training goes on with these.

        Without an optimizer the run is over: where there is an average, it is what the model gets.

        Raises:
            CheckpointError: the model has other tensors than the stored one; it is then as it was.
        """
        try:
            with safe_open(self.path, framework="pt") as file:
                stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 — no mapping
        except (SafetensorError, OSError) as error:
            msg = f"{self.path} is damaged ({error}). Delete it, or use another folder."
            raise CheckpointError(msg) from error
        here = {f"model/{name}": tensor for name, tensor in _model_tensors(model)}
        there = {name: tensor for name, tensor in stored.items() if name.startswith("model/")}
        odd = [
            n for n in here.keys() | there.keys() if n not in here or n not in there or not _alike(here[n], there[n])
        ]
        if odd:
            msg = (
                f"{self.path} is of another model: {len(odd)} tensors differ in name, shape or dtype, such as "
                f"{min(odd).removeprefix('model/')!r}. Use another folder."
            )
            raise CheckpointError(msg)
        if optimizer is not None:
            self._restore_optimizer(model, optimizer, stored)
        averages = {n.removeprefix("average/"): t for n, t in stored.items() if n.startswith("average/")}
        if average is not None:
            _same_names(averages, average.tensors, self.path)
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
        """Replace the file by one that holds the run as it is now.

        Raises:
            CheckpointError: it cannot be written; the former file is still there.
        """
        tensors = {f"model/{name}": tensor for name, tensor in _model_tensors(model)}
        tensors |= dict(_optimizer_tensors(model, optimizer))
        if average is not None:
            tensors |= {f"average/{name}": tensor for name, tensor in average.tensors.items()}
        tensors = {
            n: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for n, t in tensors.items()
        }
        try:
            with written_whole(self.path) as partial:
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
    """Iterate over the parameters and buffers, each once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the state of the optimizer under the names of the parameters that it is about."""
    for name, parameter in model.named_parameters():
        for entry, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                yield f"optimizer/{name}/{entry}", value


def _same_names(stored: dict[str, Tensor], here: dict[str, Tensor], path: Path) -> None:
    if stored.keys() != here.keys():
        odd = min(stored.keys() ^ here.keys())
        msg = f"{path} averaged other tensors than are trained now, such as {odd!r}. Use another folder."
        raise CheckpointError(msg)


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype


def _laid_out_like(parameter: Tensor, value: Tensor) -> Tensor:
    """Return the value with the strides of the parameter: fused optimizers walk through both in memory order."""
    if value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
