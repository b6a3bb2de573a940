"""What a command says beside its result, to terminals and to files."""

from __future__ import annotations

import logging
import re
import time
import warnings
from pathlib import Path

import pytest

from tenfold.cli import commands
from tenfold.cli.notes import Notes
from tenfold.progress import Event, logger
from tests.cli.conftest import Run
from tests.test_progress import Screen

QUICK = ("--budget", "macs=0.6", "--no-latency", "--no-tune", "--out", "out")


def test_each_step_is_a_line_where_nobody_sees_a_bar(tenfold: Run, tiny: str) -> None:
    outcome = tenfold("compress", "--task", tiny, *QUICK)
    steps = [line for line in outcome.err.splitlines() if line.endswith(" ...")]
    wanted = ["open the model", "profile", "evaluate", "find units", "calibrate", "plan", "apply"]
    assert steps[:7] == [f"tenfold: {name} ..." for name in wanted]


def test_quiet_says_nothing_and_verbose_everything_with_the_time(tenfold: Run, tiny: str) -> None:
    assert tenfold("compress", "--task", tiny, "-q", *QUICK).err == ""
    told = tenfold("compress", "--task", tiny, "-v", *QUICK).err.splitlines()
    assert all(re.match(r"tenfold: (\d\d:\d\d:\d\d |warning: )", line) for line in told), told
    assert any("fit layers: " in line for line in told)
    assert any("calibrate took" in line for line in told)
    assert tenfold("profile", "--task", tiny, "-q", "-v").is_error("--verbose or --quiet", code=2)


@pytest.mark.parametrize("name", [path.stem for path in sorted(Path(commands.__path__[0]).glob("[!_]*.py"))])
def test_every_command_can_be_quiet_or_verbose(tenfold: Run, name: str) -> None:
    shown = re.sub(r"\x1b\[[\d;]*m", "", tenfold(name, "--help").out)
    assert re.search(r"--quiet\s+-q", shown)
    assert re.search(r"--verbose\s+-v", shown)


def test_silence_is_broken_with_what_is_under_way(capsys: pytest.CaptureFixture[str]) -> None:
    notes = Notes(silence=0.05)
    with notes.session():
        notes.on_event(Event("fit layers", 3, 12))
        time.sleep(0.4)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 8
    assert lines[0] == "tenfold: still at work: fit layers: 3 of 12, 0 s so far"
    with Notes(silence=0.05, quiet=True).session():
        time.sleep(0.2)
    assert capsys.readouterr().err == ""


def test_lines_on_a_terminal_are_not_written_into_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    notes = Notes()
    with notes.session():
        notes.on_event(Event("fit layers", 1, 4))
        logger.info("fit layers: 1 of 4")  # the bar says it
        assert "\n" not in screen.getvalue()
        logging.getLogger("tenfold").info("a sketch is kept")
        warnings.warn("much\nto do", UserWarning, stacklevel=1)
    lines = [line.rpartition("\r")[2] for line in screen.getvalue().split("\n")]
    assert lines == ["tenfold: a sketch is kept", "tenfold: warning: much to do", ""]
