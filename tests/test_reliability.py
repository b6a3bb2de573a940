"""A small sample of ``python -m benchmarks.reliability.run``: damaged files, and commands that are killed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.reliability.fuzz import Target, fuzz, quietly, targets
from benchmarks.reliability.kills import compressed, kill

STAGES = [
    "run.json",
    ".stage-0002/plan.json",
    ".stage-0002/start/record.json",
    ".stage-0002/training/tuning.safetensors",
]
SAVED = ["model.safetensors", "plan.yaml", "recipe.yaml", "record.json", "analysis.json", "options.json"]
OTHERS = ["schedule.yaml", "sensitivity table", "error cache", "latency cache", "cached logits", "training snapshot"]
KINDS = [*SAVED, *OTHERS, "net.pth", "net.safetensors", *(f"stages: {name}" for name in STAGES)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return quietly(lambda: targets(tmp_path_factory.mktemp("files")))


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_refused_or_the_same(kind: str, files: dict[str, Target]) -> None:
    counts, faults = quietly(lambda: fuzz(files[kind], flips=6, truncations=2, seed=1))
    assert faults == []
    assert sum(counts.values()) == 8


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the compressed model that the commands begin with."""
    return compressed(tmp_path_factory.mktemp("begin"))


@pytest.mark.parametrize("command", ["tune", "export"])
def test_a_killed_command_ends_with_the_same_bytes(command: str, half: Path, tmp_path: Path) -> None:
    if command == "export":
        pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'tenfold[export]'")
    shutil.copytree(half, tmp_path / half.name)
    (found,) = kill(command, 1, tmp_path, seed=3)
    assert found["faults"] == []
