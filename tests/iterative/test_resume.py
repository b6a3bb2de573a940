"""A run that is killed at any moment ends, given again, with the very files of one that was not."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tenfold import checkpoint
from tenfold.errors import CheckpointError
from tenfold.iterative import Stage, Training, compress_iteratively, folder, stages
from tenfold.pipeline import Compressed
from tenfold.progress import Event
from tenfold.records import Record
from tenfold.runtime import Runtime
from tenfold.training import TuneConfig
from tests.iterative.killed import CONFIG, HOW
from tests.iterative.small import accuracy, batches, both, cnn, images, unlabeled

ONE = images()[0][:1]
SCRIPT = Path(__file__).parent / "killed.py"
STAGES = ["stage-0001", "stage-0002", "stage-0003"]


class Crash(Exception):  # noqa: N818 - as a power cut is none
    pass


RECIPE, SCHEDULE = HOW


def go(run: Path | None, **choices: Any) -> Compressed:
    recipe, schedule = choices.pop("recipe", RECIPE), choices.pop("schedule", SCHEDULE)
    choices = {"tune": Training(batches, choices.pop("config", CONFIG)), **choices}
    return compress_iteratively(cnn(), ONE, recipe, schedule, runtime=Runtime(folder=run), **choices)


def weights(run: Path) -> list[bytes]:
    return [(run / name / checkpoint.model_folder.WEIGHTS).read_bytes() for name in STAGES]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that nothing disturbed."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    go(path)
    return path


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def test_what_is_on_disk(whole: Path) -> None:
    assert names(whole) == sorted([*STAGES, "latest", "record.json", "run.json"])
    assert (whole / "latest").read_text().strip() == "stage-0003"
    told = json.loads((whole / "record.json").read_text())
    assert [s["index"] for s in told["stages"]] == [1, 2, 3]
    for name in STAGES:
        model, plan = checkpoint.load(cnn(), whole / name)
        assert plan.factorized
        assert model(ONE).isfinite().all()


def test_with_and_without_a_folder_it_is_the_same_model(whole: Path) -> None:
    expected, plan = checkpoint.load(cnn(), whole / "stage-0003")
    result = go(None)
    assert result.plan == plan
    state = result.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in expected.state_dict().items())


def test_a_run_that_is_finished_returns_at_once(whole: Path) -> None:
    before = weights(whole)

    def never(epoch: int) -> Any:
        raise AssertionError(epoch)

    result = go(whole, tune=Training(never, CONFIG))
    assert weights(whole) == before
    assert len(result.record.stages) == 3


@pytest.mark.parametrize(("epoch", "step"), [(1, 1), (2, 0)])
def test_killed_in_a_stage_and_at_the_start_of_one(whole: Path, tmp_path: Path, epoch: int, step: int) -> None:
    run = tmp_path / "run"
    command = [sys.executable, str(SCRIPT), str(run)]
    done = subprocess.run([*command, str(epoch), str(step)], check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len([p for p in run.iterdir() if p.name.startswith("stage-")]) == epoch // 2
    go(run)  # in this process, which knows nothing of the other
    assert weights(run) == weights(whole)
    assert names(run) == names(whole)


class Disk:
    """Does what it is told, and crashes before its ``last`` operation; 0 for never."""

    def __init__(self) -> None:
        self.count, self.last = 0, 0

    def guard(self, operation: Any) -> Any:
        def act(*args: Any, **choices: Any) -> Any:
            self.tick()
            return operation(*args, **choices)

        return act

    def tick(self) -> None:
        self.count += 1
        if self.count == self.last:
            raise Crash


def test_a_crash_around_any_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before every operation on the disk, a run ends: what is there is always enough to go on to the same files."""
    disk = Disk()
    for name in ("save", "write_text", "_remove"):
        monkeypatch.setattr(folder, name, disk.guard(getattr(folder, name)))
    monkeypatch.setattr(Record, "save_sealed", disk.guard(Record.save_sealed))
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)), torch.zeros(1, 16)
    how = both(rounds=2, path="rule", rule={"name": "ratio", "share": 0.6}, formats=["low_rank"], epochs=0)

    def walk(run: Path) -> dict[str, bytes]:
        for stage in stages(net, x, *how, runtime=Runtime(folder=run)):
            with torch.no_grad():
                next(stage.model.parameters()).mul_(1.5)
        return {p.name: (p / "model.safetensors").read_bytes() for p in sorted(run.glob("stage-*"))}

    expected = walk(tmp_path / "whole")
    assert len(expected) == 2
    total = disk.count
    for last in range(1, total + 1):
        run, disk.count, disk.last = tmp_path / f"run{last}", 0, last
        with pytest.raises(Crash):
            walk(run)
        disk.last = 0
        assert walk(run) == expected, last
        assert names(run) == names(tmp_path / "whole"), last
    assert total > 10


def test_a_loop_of_ones_own_gets_the_stage_again_from_its_start(tmp_path: Path) -> None:
    first: dict[str, torch.Tensor] = {}
    for stage in stages(
        cnn(), ONE, *HOW, runtime=Runtime(folder=tmp_path / "run"), data=unlabeled(), evaluate=accuracy
    ):
        if stage.index == 2:
            first = {name: tensor.clone() for name, tensor in stage.model.state_dict().items()}
            with torch.no_grad():
                next(stage.model.parameters()).zero_()  # half a training, and out of the loop
            break
    again = next(
        stages(cnn(), ONE, *HOW, runtime=Runtime(folder=tmp_path / "run"), data=unlabeled(), evaluate=accuracy)
    )
    assert again.index == 2
    assert all(torch.equal(first[name], tensor) for name, tensor in again.model.state_dict().items())
    assert set(again.record.scores) == {"compressed"}


def test_a_damaged_pointer_is_put_right(whole: Path) -> None:
    (whole / "latest").write_text("stage-0001\n")
    go(whole)
    assert (whole / "latest").read_text() == "stage-0003\n"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schedule": SCHEDULE.replace(epochs=3)}, "epochs is 2 there and 3 here"),
        ({"recipe": RECIPE.replace(rule="evbmf")}, "rule"),
        ({"config": TuneConfig(lr=0.5)}, "the identity is"),
        ({"data": unlabeled()}, "its calibration data are others"),
        ({"recipe": RECIPE.replace(seed=3)}, "seed is 0 there and 3 here"),
        (
            {"recipe": RECIPE.replace(calibration={"method": "batchnorm"})},
            "calibration is",
        ),
    ],
)
def test_the_folder_of_another_run_is_refused(whole: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match="holds another run") as caught:
        go(whole, **changes)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_weights_are_another_run(whole: Path) -> None:
    net = cnn()
    with torch.no_grad():
        net[0].bias[0] += 1
    with pytest.raises(CheckpointError, match="it started from other weights"):
        next(stages(net, ONE, *HOW, runtime=Runtime(folder=whole)))


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(CheckpointError, match=r"holds other files, such as holiday\.jpg"):
        stages(cnn(), ONE, *HOW, runtime=Runtime(folder=tmp_path))


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write stages"):
        stages(cnn(), ONE, *HOW, runtime=Runtime(folder=tmp_path / "file"))


def test_a_run_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"version": 2}')
    with pytest.raises(CheckpointError, match="not a valid Run"):
        stages(cnn(), ONE, *HOW, runtime=Runtime(folder=tmp_path))


def test_a_damaged_stage_is_not_passed_over(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    go(run)
    file = run / "stage-0003" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="damaged"):
        go(run)


def test_stages_know_where_their_training_may_write(tmp_path: Path) -> None:
    seen: list[Stage] = []
    for stage in stages(cnn(), ONE, *HOW, runtime=Runtime(folder=tmp_path / "run")):
        assert stage.folder is not None
        stage.folder.mkdir(parents=True)
        (stage.folder / "own").touch()
        seen.append(stage)
    assert len({stage.folder for stage in seen}) == len({stage.identity for stage in seen}) == 3
    assert not any(stage.folder.exists() for stage in seen if stage.folder)


def test_a_stage_that_is_killed_between_blocks_goes_on_after_the_last(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(2)))
    model, data = nn.Sequential(nn.Linear(8, 16), blocks, nn.Linear(16, 3)).eval(), [torch.randn(64, 8)] * 4
    recipe = {"budget": "params=0.7", "formats": "low_rank", "calibration": {"refine": 4}}

    def first(**how: Any) -> nn.Module:
        return next(stages(model, data[0][:1], recipe, {"rounds": 1}, data=data, runtime=Runtime(**how))).model

    def crash(event: Event) -> None:
        if event.step == "refine blocks" and event.done == 1:
            raise Crash

    with pytest.raises(Crash):
        first(folder=tmp_path / "run", on_event=crash)
    with caplog.at_level("INFO"):
        ended = first(folder=tmp_path / "run")
    assert "resuming after block 1 of 2" in caplog.text
    whole = first()
    assert all(torch.equal(a, b) for a, b in zip(ended.parameters(), whole.parameters(), strict=True))
    assert not (tmp_path / "run" / ".stage-0001" / "blocks").exists()
