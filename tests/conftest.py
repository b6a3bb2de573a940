"""What every test stands on: one thread, one seed, and a torchvision that imports beside a CPU-only torch."""

from __future__ import annotations

import contextlib
import importlib.util
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the tests run in one process per core


def supply_torchvision_ops() -> torch.library.Library | None:
    """Define the two operators that torchvision needs at import where its compiled library does not load.

    A torchvision wheel built for CUDA finds no CUDA libraries beside a CPU-only torch. Its Python code then fails to
    import, because it attaches fake kernels to operators that do not exist. No test here runs these operators, so
    their schemas suffice.

    Returns:
        What keeps the definitions alive, or None where nothing was missing.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return None
    compiled = next(Path(found.origin).parent.glob("_C.*"), None)
    if compiled is not None:
        with contextlib.suppress(OSError):
            torch.ops.load_library(str(compiled))
    if hasattr(torch.ops.torchvision, "nms"):
        return None
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


_torchvision_ops = supply_torchvision_ops()  # held for the whole run: the definitions die with it


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Start every test from the same state of torch's global generator."""
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """Count the skipped tests by reason, below the summary that lists them: CI logs are read from their end."""
    yield
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    why = "".join(f"; {number} × {reason}" for reason, number in reasons.most_common())
    terminalreporter.write_line(f"Tests skipped: {len(skipped)}{why}")
    if _torchvision_ops is not None:
        from tenfold.diagnosis import trouble  # not above: a process without tenfold takes the stand-ins from here too

        met = trouble(RuntimeError("operator torchvision::nms does not exist"))  # what users meet here
        terminalreporter.write_line(
            f"Stand-ins for torchvision's operators, which users of this environment lack: {met}"
        )
