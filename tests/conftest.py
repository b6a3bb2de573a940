"""What every test stands on: one thread, one seed, and a torchvision that imports beside a CPU-only torch."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import os
from collections import Counter
from collections.abc import Iterator
from functools import cache, partial
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
def one_thread_again() -> None:
    """Begin each test with one thread, whatever the one before has left: sums in another order are other numbers."""
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def trained_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the weights of the trained network of the task ``digits``: a run trains it once, for all processes."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install 'tenfold[demo]'")
    from safetensors.torch import save_file

    from tenfold.tasks import load_task

    folder = tmp_path_factory.getbasetemp()
    file = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "digits.safetensors"
    if not file.exists():
        save_file(load_task("digits").dense().state_dict(), folder / "trained.safetensors")
        (folder / "trained.safetensors").replace(file)
    return file


@pytest.fixture(autouse=True, scope="session")
def _brief_timing() -> None:
    """Time for half a second what is timed along the way, and not for four; who tests timing says how long."""
    from tenfold.planning import latency_budget
    from tenfold.profiling import compare_latency

    assert compare_latency.__kwdefaults__["seconds"] == latency_budget.LatencySearch().seconds == 4.0
    compare_latency.__kwdefaults__["seconds"] = 0.5
    latency_budget.LatencySearch = partial(latency_budget.LatencySearch, seconds=0.5, layer_seconds=0.1)


@pytest.fixture(autouse=True, scope="session")
def _translations_read_once() -> None:
    """Read once in a process how ONNX says torch's operators: torch parses the sources of 500 functions per export."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    read = cache(ONNXRegistry.from_torchlib)

    def copied(**opset: int) -> ONNXRegistry:
        registry = copy.copy(read(**opset))
        registry.functions = {name: list(found) for name, found in registry.functions.items()}
        return registry

    ONNXRegistry.from_torchlib = staticmethod(copied)


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
