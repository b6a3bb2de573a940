"""Kill commands with signal 9 at any moment and give them again: the same bytes in the end, and nothing left behind."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
TASK = ("--task", f"{Path(__file__).parent / 'points.py'}:Points", "--threads", "1")
BUDGET = ("--budget", "macs=0.5", "--calibration-samples", "400")

# What is killed, and the files that are compared.
COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "compress": (
        ["compress", *TASK, *BUDGET, "--no-latency", "--out", "out"],
        ["out/model.safetensors", "out/options.json"],
    ),
    "stages": (
        ["stages", *TASK, *BUDGET, "--rounds", "2", "--epochs", "6", "--out", "out", "--run", "run"],
        ["out/model.safetensors", "run/stage-0001/model.safetensors", "run/stage-0002/model.safetensors"],
    ),
    "tune": (["tune", *TASK, "--checkpoint", "half", "--epochs", "12", "--out", "out"], ["out/model.safetensors"]),
    "sensitivity": (
        ["sensitivity", *TASK, "--samples", "200", "--ranks", "6", "--jobs", "2", "--out", "table.json"],
        ["table.json"],
    ),
    "export": (
        [
            "export",
            *TASK,
            "--checkpoint",
            "half",
            "--to",
            "onnx",
            "--seconds",
            "0.5",
            "--overwrite",
            "--out",
            "half.onnx",
        ],
        ["half.onnx"],
    ),
}


def kill(name: str, kills: int, work: Path, seed: int) -> Iterator[dict[str, Any]]:
    """Yield what became of each kill of a command: when, and what was wrong in the end.

    Args:
        name: of the command.
        kills: moments, one in each of as many equal parts of the time that the command takes undisturbed.
        work: an empty folder.
        seed: of the moments.
    """
    arguments, files = COMMANDS[name]
    whole = _folder(work, "whole")
    start = time.perf_counter()
    _run(arguments, whole).check()
    seconds = time.perf_counter() - start
    expected = {file: (whole / file).read_bytes() for file in files}
    listing = _listing(whole)
    chance = random.Random(seed)  # noqa: S311 - not for secrets
    for number in range(kills):
        folder = _folder(work, f"kill-{number}")
        after = seconds * (number + chance.random()) / kills
        run = _run(arguments, folder)
        time.sleep(after)
        killed = run.process.poll() is None
        run.process.send_signal(signal.SIGKILL)
        run.process.wait()
        workers = run.workers_left(10)
        again = _run(arguments, folder)
        again.process.wait()
        faults = [f"exit code {again.process.returncode}: {again.said()}"] if again.process.returncode else []
        faults += [f"{file} differs" for file in files if _bytes(folder / file) != expected[file]]
        faults += [f"left behind: {path}" for path in sorted(_listing(folder) ^ listing)]
        faults += [f"{workers} workers live on"] if workers else []
        yield {"after_s": round(after, 2), "killed": killed, "faults": faults}
        shutil.rmtree(folder)


class _run:  # noqa: N801 - reads as a verb
    """A command in a folder, in a process group and with a temporary folder of its own."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "tmp")}
        self.log = folder.with_suffix(".log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tenfold", *arguments, "--quiet"],
                cwd=folder,
                env=environ,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def check(self) -> None:
        if self.process.wait():
            raise RuntimeError(self.said())

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace").strip()[-300:]

    def workers_left(self, patience: float) -> int:
        """Return how many processes of the group still live after some seconds."""
        end = time.monotonic() + patience
        while (left := _alive(self.process.pid)) and time.monotonic() < end:
            time.sleep(0.2)
        return left


def _alive(group: int) -> int:
    """Return how many processes of a group there are that have not ended."""
    found = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=True).stdout.split("\n")  # noqa: S607
    return sum(row.split()[0] == str(group) and "Z" not in row.split()[1] for row in found if row.strip())


def _folder(work: Path, name: str) -> Path:
    """Return a folder with the compressed model that some commands begin with, and one for temporary files."""
    folder = work / name
    (folder / "tmp").mkdir(parents=True)
    shutil.copytree(compressed(work), folder / "half")
    return folder


def compressed(work: Path) -> Path:
    """Return the folder ``half`` with the compressed model, made unless it is there."""
    half = work / "half"
    if not half.exists():
        (work / "first" / "tmp").mkdir(parents=True)
        first = ["compress", *TASK, *BUDGET, "--no-tune", "--no-latency", "--no-eval", "--out", str(half)]
        _run(first, work / "first").check()
    return half


def _listing(folder: Path) -> set[str]:
    """Return all files and folders; of those that other libraries keep for temporary files none."""
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if "tmp" not in path.relative_to(folder).parts or path.name.startswith("tenfold-")
    }


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""
