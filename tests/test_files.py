"""Files appear whole or not at all; what killed processes leave is removed, what living ones use is not."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tenfold.checkpoint import save
from tenfold.checkpoint.state_dicts import write_state_dict
from tenfold.errors import FileError, TenfoldError
from tenfold.files import atomic_write, check_writable, in_use, locked, scratch, staged, write_text
from tenfold.pipeline import compress
from tenfold.planning import Sensitivity
from tenfold.profiling import profile
from tenfold.records import JsonCache
from tenfold.reporting import render_record  # noqa: F401 - imports the charts before the disk is full
from tenfold.reporting.report import write_report
from tenfold.reporting.run_files import Run
from tenfold.runtime import Runtime
from tenfold.training import TuneConfig, finetune

ROOT = Path(__file__).parent.parent


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Return a function that starts another process, which runs code until it says that it is ready and waits."""
    started = []

    def start(code: str) -> subprocess.Popen[bytes]:
        body = f"import time\nfrom pathlib import Path\nfrom tenfold.files import *\n{code}\n"
        environ = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen([sys.executable, "-c", body], cwd=tmp_path, env=environ, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


WAIT = "print('ready', flush=True); time.sleep(60)"


def test_leftovers_go_when_their_process_is_dead_and_not_before(tmp_path: Path, elsewhere: Any) -> None:
    writer = elsewhere(f"with staged(Path('out')) as own:\n    (own / 'half').write_text('x'); {WAIT}")
    (left,) = tmp_path.glob(".out.*.partial")
    (tmp_path / ".out.notes.partial.txt").write_text("somebody's own")
    write_text(tmp_path / "out", "text")
    assert left.is_dir()
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    write_text(tmp_path / "other", "text")
    assert left.is_dir()  # of another name
    write_text(tmp_path / "out", "text")
    assert names(tmp_path) == {"out", "other", ".out.notes.partial.txt"}


def test_temporary_folders_of_dead_processes_go(
    tmp_path: Path, elsewhere: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "tenfold-results").mkdir()
    writer = elsewhere(f"import tempfile; tempfile.tempdir = '.'\nwith scratch(): {WAIT}")
    with scratch() as own:
        assert len(names(tmp_path)) == 3
    writer.kill()
    writer.wait()
    with scratch() as own:
        assert names(tmp_path) == {"tenfold-results", own.name}
    assert names(tmp_path) == {"tenfold-results"}


def test_a_folder_in_use_is_refused_in_one_line_until_its_process_ends(tmp_path: Path, elsewhere: Any) -> None:
    lock = tmp_path / ".lock"
    other = elsewhere(f"with in_use(Path('.lock'), Path('run')): {WAIT}")
    with (
        pytest.raises(FileError, match=rf"run is in use by process {other.pid}: wait") as caught,
        in_use(lock, tmp_path / "run"),
    ):
        pass
    assert "\n" not in str(caught.value)
    other.kill()
    other.wait()
    with in_use(lock, tmp_path / "run"), pytest.raises(FileError, match="in use"), in_use(lock, tmp_path / "run"):
        pass
    assert names(tmp_path) == set()


def test_locks_leave_nothing_and_lose_nothing(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom tenfold.files import locked, write_text\n"
        "for _ in range(50):\n"
        "    with locked(Path('n')):\n"
        "        write_text(Path('n'), str(int(Path('n').read_text()) + 1))\n"
    )
    (tmp_path / "n").write_text("0")
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environ) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert (tmp_path / "n").read_text() == "100"
    assert names(tmp_path) == {"n"}


def test_an_error_leaves_the_former_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "a") as partial:
        partial.write_text(str(1 / 0))
    assert names(tmp_path) == {"a"}
    assert (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize(("path", "words"), [("folder", "it is a folder"), ("file/below", "Not a directory")])
def test_what_cannot_be_written_is_said_before(tmp_path: Path, path: str, words: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=rf"cannot write .*{path}: {words}"):
        check_writable(tmp_path / path)
    check_writable(tmp_path / "new" / "file")
    assert names(tmp_path) == {"folder", "file"}


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"a\xff")
    write_text(path, f"of {path.name}")
    assert path.read_text() == "of a\\udcff"
    result = compress(*net(), "macs=0.6", runtime=Runtime(measure=False))
    assert (result.save(tmp_path / os.fsdecode(b"out\xff")) / "plan.yaml").is_file()


def net() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval(), torch.zeros(1, 64)


@pytest.fixture
def full_disk() -> Iterator[Callable[[], None]]:
    """Return a function after which no file can grow beyond a few bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "what",
    ["checkpoint", "plan", "recipe", "options", "cache", "sensitivity", "report", "snapshot", "weights", "export"],
)
def test_a_full_disk_is_one_error_of_ours(tmp_path: Path, full_disk: Callable[[], None], what: str) -> None:
    model, x = net()
    result = compress(model, x, "macs=0.6", runtime=Runtime(measure=False))
    found = Sensitivity(model, profile(model, x), {"formats": ["low_rank"]}, path=tmp_path / "table.json")
    batches = [(torch.randn(8, 64), torch.zeros(8, dtype=torch.long))]

    def export() -> None:
        from tenfold.exporting import ExportConfig, export

        export(model, x, tmp_path / "net.pt2", to="torch-export", config=ExportConfig(seconds=0))

    work: dict[str, Callable[[], object]] = {
        "checkpoint": lambda: save(result.model, result.plan, tmp_path / "out"),
        "plan": lambda: result.plan.save(tmp_path / "plan.yaml"),
        "recipe": lambda: result.plan.recipe.save(tmp_path / "recipe.yaml"),
        "options": lambda: result.table.save(tmp_path / "options.json"),
        "cache": lambda: JsonCache(tmp_path / "cache.json").add({"a": {str(i): i for i in range(100)}}),
        "sensitivity": lambda: found.measure(2),
        "report": lambda: write_report(Run("run", result.record), tmp_path / "report.html"),
        "snapshot": lambda: finetune(model, batches, TuneConfig(epochs=1), folder=tmp_path / "tuning"),
        "weights": lambda: write_state_dict(model.state_dict(), tmp_path / "net.safetensors"),
        "export": export,
    }
    full_disk()
    with pytest.raises(TenfoldError, match=r"too large|No space|cannot be written") as caught:
        work[what]()
    assert "\n" not in str(caught.value)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    assert not list(tmp_path.rglob("*.partial"))


def test_a_folder_of_its_own_can_be_staged_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with staged(Path("out")) as folder, locked(Path("out")):
        assert names(tmp_path) == {folder.name, ".out.lock"}
    assert names(tmp_path) == set()


def test_a_folder_that_is_taken_for_a_leftover_before_it_is_opened_is_made_anew(
    tmp_path: Path, monkeypatch: Any
) -> None:
    """Another process may look for leftovers just between making a folder and opening it."""
    make, made = tempfile.mkdtemp, []

    def robbed(**options: Any) -> str:
        made.append(make(**options))
        if len(made) == 1:
            Path(made[0]).rmdir()
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", robbed)
    with staged(tmp_path / "out") as folder:
        assert folder.is_dir()
    assert len(made) == 2
