"""The main job on the embedded task, through the command line, as a user gives it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tenfold.checkpoint import load
from tenfold.tasks import load_task

Run = Callable[..., Any]


def test_compress_digits(tenfold: Run, trained_digits: Path) -> None:
    task = load_task("digits")
    args = ("--task", "digits", "--weights", trained_digits, "--budget", "macs=0.4", "--formats", "low_rank")
    found = tenfold("compress", *args, "--epochs", "1", "--no-latency", "--json", "--out", "small").json
    assert found["after"]["macs"] <= 0.4 * found["before"]["macs"]
    assert found["after"]["score"] > found["before"]["score"] - 0.03
    small, plan = load(task.build(), Path("small"))
    assert task.evaluate(small) == found["after"]["score"]
    assert plan.factorized
    shown = tenfold("eval", "--checkpoint", "small")  # the checkpoint knows its task
    assert f"{100 * found['after']['score']:.2f} %" in shown.out
