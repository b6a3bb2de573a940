"""How far work is: in a log that nobody needs to set up, and in a bar for whoever watches."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable

import pytest
import torch
from torch import nn

import tenfold
from tenfold import progress
from tenfold.progress import Event, Pace, ProgressBar


class Screen(io.StringIO):
    """A terminal, as far as asking goes; ``line`` is what stands on it in the end."""

    def isatty(self) -> bool:
        return True

    @property
    def line(self) -> str:
        shown = ""
        for part in self.getvalue().split("\r"):
            shown = part + shown[len(part) :]
        return shown.rstrip()


def clock(*times: float) -> Callable[[], float]:
    left = list(times)
    return lambda: left.pop(0) if len(left) > 1 else left[0]


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3)).eval()


@pytest.mark.parametrize(
    ("now", "done", "line"),
    [
        (0.5, 1, "fit: 1 of 4"),
        (10.0, 1, "fit: 1 of 4, about 30 s left"),
        (10.0, 4, "fit: 4 of 4"),
        (9.0, 0, "fit: 0 of 4"),
    ],
)
def test_the_time_left_is_that_of_what_was_done(now: float, done: int, line: str) -> None:
    assert Pace("fit", clock(0.0, now)).line(done, 4) == line


def test_what_was_done_before_takes_no_time() -> None:
    """Neither epochs that were restored nor what a step did before it could count are taken for its pace."""
    assert Pace("tune", clock(0.0, 10.0), first=100).line(110, 120) == "tune: 110 of 120, about 10 s left"
    bar = ProgressBar(Screen())
    bar(Event("tune"))
    bar(Event("tune", 101, 120))
    assert (bar.pace.first, bar.last.done) == (101, 101)
    bar(Event("tune", 102, 120))
    assert bar.pace.first == 101


def test_a_long_step_is_a_line_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    seconds = [0.0]
    pace = Pace("fit", lambda: seconds[0])
    with caplog.at_level(logging.INFO, "tenfold"):
        for done in range(1, 121):
            seconds[0] += 1.0
            pace.log(done, 120)
    assert [record.message.split(",")[0] for record in caplog.records] == [
        f"fit: {n} of 120" for n in (30, 60, 90, 120)
    ]


def test_verbs_log_steps_and_layers_and_set_up_no_handler(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, data = net(), torch.randn(32, 3, 10, 10)
    runtime = tenfold.Runtime(measure=False)
    with caplog.at_level(logging.DEBUG, "tenfold"):
        small = tenfold.compress(model, data[:1], "macs=0.5", data=data, runtime=runtime)
    said = [record.getMessage() for record in caplog.records if record.name == progress.logger.name]
    steps = [text.removesuffix(" ...") for text in said if text.endswith(" ...")]
    assert steps[:5] == ["profile", "find units", "calibrate", "plan", "apply"]
    layers = len(small.plan.factorized)
    assert [text.split(",")[0] for text in said if text.startswith("fit layers")][
        -1
    ] == f"fit layers: {layers} of {layers}"
    assert any(text.startswith("look at data: ") for text in said)
    assert any(text.startswith("weigh options: ") for text in said)
    assert logging.getLogger("tenfold").handlers == []


def test_training_logs_each_epoch(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tenfold"):
        batches = [(torch.randn(4, 2), torch.tensor([0, 1, 0, 1]))]
        tenfold.finetune(nn.Linear(2, 2), batches, tenfold.TuneConfig(epochs=2), evaluate=lambda _: 0.25)
    assert [record.message.split(":")[0] for record in caplog.records] == ["epoch 1/2", "epoch 2/2"]
    assert all("score 0.25" in record.message for record in caplog.records)


def test_the_bar_shows_the_step_its_share_and_goes() -> None:
    screen = Screen()
    bar = ProgressBar(screen)
    bar(Event("profile"))
    assert screen.line == "profile ..."
    bar(Event("fit layers", 3, 12))
    assert screen.line == f"[{'=' * 6}{' ' * 18}] fit layers: 3 of 12"
    bar(Event("fit layers", 4, 12))  # at once after the other: not drawn
    assert "3 of 12" in screen.line
    bar(Event("fit layers", 12, 12))
    assert screen.line == ""


def test_the_bar_is_drawn_where_somebody_sees_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert not ProgressBar(io.StringIO()).is_watched
    assert ProgressBar(Screen()).is_watched
    cell = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})
    assert ProgressBar(cell()).is_watched
    with tenfold.Runtime(progress=True).step("plan"):  # standard error is no terminal here
        pass
    assert capsys.readouterr().err == ""


def test_an_error_leaves_no_bar_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    runtime = tenfold.Runtime(progress=True)

    def fail() -> None:
        with runtime.step("apply"):
            runtime.counter("fit layers")(1, 4)
            assert "fit layers: 1 of 4" in screen.line
            msg = "no"
            raise ValueError(msg)

    with pytest.raises(ValueError, match="no"):
        fail()
    assert screen.line == ""
