"""A run in stages on disk: one checkpoint for each stage that is complete, and what the present one needs to go on.

``stage-0001``, ``stage-0002`` ... are checkpoints; ``latest`` holds the name of the last one, ``record.json`` the
record of the run so far and ``run.json`` what run it is. ``.stage-0003`` is at work: the model as the stage began, and
what its training keeps. ``.lock`` is there while a process works in the folder. A checkpoint appears whole or not at
all: a kill at any moment costs at most the present epoch.
"""

from __future__ import annotations

import re
import shutil
from contextlib import ExitStack
from pathlib import Path

from pydantic import Field
from torch import nn

from tenfold.allocation.schedule import Schedule
from tenfold.checkpoint import load, read_record, save
from tenfold.errors import CheckpointError, FileError, TenfoldError
from tenfold.files import check_writable, in_use, read_text, reason, write_text
from tenfold.records import Plan, Recipe, Record, RunRecord

RUN, LATEST, RECORD, PLAN, START, TRAINING = "run.json", "latest", "record.json", "plan.json", "start", "training"
BLOCKS = "blocks"
LOCK = ".lock"
_STAGE = re.compile(r"stage-(\d{4,})")
VERSION = 3  # 2 kept the plan of a stage without a digest


class Run(Record):
    """What a run is about. Two that differ in anything but ``tenfold`` do not share a folder.

    Attributes:
        model: digest of the original weights.
        data: digest of the calibration batches; empty without.
        recipe: in full.
        schedule: in full.
        choices: everything else that the outcome depends on, in words.
    """

    version: int = VERSION
    tenfold: str
    model: str
    data: str = ""
    recipe: Recipe
    schedule: Schedule
    choices: dict[str, str] = Field(default_factory=dict)


class RunFolder:
    """The folder of a run, in use by this process until it leaves it as a context.

    Args:
        path: made if it does not exist.
        run: what run it is.

    Raises:
        CheckpointError: the folder cannot be written, or holds something else or another run.
        FileError: another process works in it.
    """

    def __init__(self, path: str | Path, run: Run) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with ExitStack() as lock:
                lock.enter_context(in_use(self.path / LOCK, self.path))
                self._claim(run)
                self._tidy()
                self._lock = lock.pop_all()
        except FileError:
            raise
        except OSError as error:
            msg = f"cannot write stages to {self.path}: {reason(error)}. Choose another folder."
            raise CheckpointError(msg) from error

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def _claim(self, run: Run) -> None:
        file = self.path / RUN
        if file.is_file():
            refuse_other(self.path, _read(file), run)
            return
        others = [p.name for p in self.path.iterdir() if not p.name.startswith((f".{RUN}", LOCK))]
        if others:
            msg = f"{self.path} holds other files, such as {min(others)}: choose a new folder for the stages"
            raise CheckpointError(msg)
        run.save_sealed(file)

    def _tidy(self) -> None:
        """Remove what a kill left behind, and let ``latest`` point where it should."""
        check_writable(self.path / RECORD)  # better to fail now than after the first stage
        for left_over in self.path.glob(".*.partial"):
            _remove(left_over)
        done = self.done
        for index in range(1, done + 1):
            _remove(self._work(index))
        if done:
            self._point(done)

    @property
    def done(self) -> int:
        """How many stages are complete."""
        there = {int(m[1]) for p in self.path.iterdir() if (m := _STAGE.fullmatch(p.name))}
        return next(n for n in range(len(there) + 1) if n + 1 not in there)

    def stage(self, index: int) -> Path:
        """Return where the checkpoint of a stage is, once that is complete."""
        return self.path / f"stage-{index:04}"

    def training(self, index: int) -> Path:
        """Return where the training of a stage may keep what it wants."""
        return self._work(index) / TRAINING

    def blocks(self, index: int) -> Path:
        """Return where the blocks of a stage are kept that are refined before it starts."""
        return self._work(index) / BLOCKS

    def _work(self, index: int) -> Path:
        return self.path / f".stage-{index:04}"

    def read(self, index: int, skeleton: nn.Module) -> tuple[nn.Module, RunRecord]:
        """Return model and record of a stage that is complete.

        Raises:
            CheckpointError: it is damaged, or was made for another model.
        """
        return self._read(self.stage(index), skeleton)

    def started(self, index: int, skeleton: nn.Module) -> tuple[nn.Module, Plan, RunRecord] | None:
        """Return a stage as it started: model, its own plan, record. None where it has not started.

        Raises:
            CheckpointError: what is there is damaged.
        """
        work = self._work(index)
        if not (work / START).is_dir():
            return None
        model, record = self._read(work / START, skeleton)
        return model, Plan.load(work / PLAN), record

    def begin(self, index: int, model: nn.Module, plan: Plan, record: RunRecord) -> None:
        """Keep a stage as it begins. The model itself is written last: what is there without it does not count."""
        work = self._work(index)
        _remove(work)
        plan.save_sealed(work / PLAN)
        save(model, record.plan, work / START, record=record)

    def complete(self, index: int, model: nn.Module, record: RunRecord) -> None:
        """Write a stage that is complete, and remove what it needed on its way."""
        save(model, record.plan, self.stage(index), record=record)
        self._point(index)
        record.save_sealed(self.path / RECORD)
        _remove(self._work(index))

    def _point(self, index: int) -> None:
        write_text(self.path / LATEST, f"{self.stage(index).name}\n")

    def _read(self, path: Path, skeleton: nn.Module) -> tuple[nn.Module, RunRecord]:
        model, _ = load(skeleton, path)
        record = read_record(path)
        if record is None or not record.stages:
            msg = f"{path} has no record of its stages: delete it, and the run goes on from the stage before"
            raise CheckpointError(msg)
        return model, record


def refuse_other(path: Path, there: Run, here: Run) -> None:
    """Raise CheckpointError if a folder holds another run, naming the first difference."""
    if there.version != VERSION:
        out = "upgrade tenfold" if there.version > VERSION else "finish the run with the tenfold that started it"
        msg = f"{path} has version {there.version}, this tenfold reads {VERSION}: {out}"
        raise CheckpointError(msg)
    differ = _differences(there, here)
    if differ:
        msg = f"{path} holds another run: {differ}. Choose another folder, or delete this one."
        raise CheckpointError(msg)


def _differences(there: Run, here: Run) -> str:
    if there.model != here.model:
        return "it started from other weights"
    old_fields, new_fields = ({**run.recipe.model_dump(), **run.schedule.model_dump()} for run in (there, here))
    for name, old in old_fields.items():
        if old != new_fields[name]:
            return f"{name} is {old!r} there and {new_fields[name]!r} here"
    for name in sorted(there.choices.keys() | here.choices.keys()):
        old, new = there.choices.get(name, "nothing"), here.choices.get(name, "nothing")
        if old != new:
            return f"{name} is {old} there and {new} here"
    return "its calibration data are others" if there.data != here.data else ""


def _read(file: Path) -> Run:
    try:
        return Run.from_text(read_text(file, "a run in stages"), source=str(file))
    except TenfoldError as error:
        msg = f"{error}. Choose another folder, or delete this one."
        raise CheckpointError(msg) from error


def _remove(path: Path) -> None:
    """Remove a file or folder, if it is there; a folder gets a name that nobody reads before it loses a part."""
    if path.is_dir():
        doomed = path.with_name(f"{path.name}.partial") if path.suffix != ".partial" else path
        if doomed != path:
            shutil.rmtree(doomed, ignore_errors=True)
            path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
