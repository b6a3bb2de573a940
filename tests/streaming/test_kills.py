"""A streamed run that the system kills without a word goes on where it was, to the same bytes."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from pathlib import Path

import pytest
import torch

from tests.streaming.killed import run
from tests.streaming.test_stream import given


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no server to fork from, or no SIGKILL")
def test_killed_in_the_middle_of_each_step(tmp_path: Path) -> None:
    _, _, data, _ = given(tmp_path)
    torch.save(torch.stack(data), tmp_path / "data.pt")
    # A fork of this process could take no gradients; one of a server that has only imported can.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.streaming.killed", "torch._dynamo", "torch.onnx", "scipy.optimize"])
    for step, calls in (("forward", 30), ("back", 30), ("fit", 70)):
        process = context.Process(target=run, args=(tmp_path, step, calls))
        process.start()
        process.join(600)
        assert process.exitcode == -signal.SIGKILL, step
        assert not (tmp_path / "out").exists()
    run(tmp_path)
    found = {file.name: file.read_bytes() for file in (tmp_path / "out").glob("model*")}
    whole = tmp_path / "whole"
    whole.mkdir()
    for name in ("dense", "data.pt"):
        (whole / name).symlink_to(tmp_path / name)
    run(whole)
    assert len(found) == 5
    assert found == {file.name: file.read_bytes() for file in (whole / "out").glob("model*")}
