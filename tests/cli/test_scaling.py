"""Many workers from the command line: the same plan from each backend, and processes that tune together."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Run = Callable[..., Any]
ROOT = Path(__file__).parents[2]


def test_workers_make_the_same_plan(tenfold: Run, tiny: str) -> None:
    if importlib.util.find_spec("joblib") is None:
        pytest.skip("needs joblib: pip install 'tenfold[scale]'")
    args = ("plan", "--task", tiny, "--budget", "macs=0.6", "--threads", "1")
    threads = torch.get_num_threads()
    try:
        expected = tenfold(*args).out
        assert tenfold(*args, "--jobs", "2").out == expected  # the task is in a file that workers cannot import
    finally:
        torch.set_num_threads(threads)


def test_commands_for_one_process_refuse_several(tenfold: Run, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("RANK", "0")
    assert tenfold("profile", "--task", tiny).is_error("tenfold profile runs in one process", "compress", code=2)


def test_two_processes_compress_together(tmp_path: Path, tiny: str) -> None:
    pytest.importorskip("accelerate", reason="needs accelerate: pip install 'tenfold[scale]'")
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    settings = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [
        "-m",
        "tenfold",
        "compress",
        "--task",
        tiny,
        "--budget",
        "macs=0.6",
        "--no-latency",
        "--json",
        "-o",
        "two",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*launch, *settings, *command], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(done.stdout)  # one object: the other process is silent
    assert record["settings"]["processes"] == 2
    assert [epoch["epoch"] for epoch in record["tuning"]] == [1, 2, 3]
    assert record["tuning"][-1]["loss"] < record["tuning"][0]["loss"]
    assert {p.name for p in tmp_path.iterdir()} == {"two"}
    assert (tmp_path / "two" / "model.safetensors").is_file()
