"""A run that was cut off at any moment ends where an uninterrupted one ends, to the last bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tenfold.errors import CheckpointError, FileError
from tenfold.records.tuning import EpochRecord
from tenfold.training import TrainingFolder, TuneConfig, TuneProgress, finetune
from tenfold.training.snapshot import FILE_NAME

CONFIG = TuneConfig(epochs=3, lr=0.05, seed=5, channels_last=True, train_as="factors")


def cnn(width: int = 4) -> nn.Sequential:
    """A little of everything that has state: channels-last kernels, batch norm, dropout, a tied and a frozen weight."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, groups=2),
        nn.Dropout(0.3),
        nn.Conv2d(width, width, 3, padding=1, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 4),
    )
    model[5].weight = model[3].weight
    model[8].bias.requires_grad_(False)
    return model


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(48, 3, 6, 6, generator=generator), torch.randint(0, 4, (48,), generator=generator)


def batches(epoch: int) -> list[tuple[Tensor, Tensor]]:
    x, y = images()
    noise = torch.randn(x.shape)  # an augmentation that draws from the global generator
    order = torch.randperm(48, generator=torch.Generator().manual_seed(epoch)).split(16)
    return [(x[i] + 0.1 * noise[i], y[i]) for i in order]


class Cut(Exception):  # noqa: N818
    pass


def cut_in_epoch(epoch: int) -> Any:
    """Return batches that raise in the middle of an epoch, counted from 1."""

    def cut(now: int) -> Any:
        for step, batch in enumerate(batches(now)):
            if now == epoch - 1 and step == 2:
                raise Cut
            yield batch

    class Cutting:
        def __init__(self, now: int) -> None:
            self.now = now

        def __len__(self) -> int:
            return 3

        def __iter__(self) -> Any:
            return cut(self.now)

    return Cutting


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def untimed(history: tuple[EpochRecord, ...]) -> list[EpochRecord]:
    return [record.replace(seconds=0) for record in history]


@pytest.mark.parametrize("epoch", [1, 2, 3])
@pytest.mark.parametrize(("optimizer", "momentum"), [("sgd", 0.9), ("sgd", 0.0), ("adamw", 0.9)])
def test_resumed_equals_uninterrupted(tmp_path: Path, optimizer: str, momentum: float, epoch: int) -> None:
    config = CONFIG.replace(optimizer=optimizer, momentum=momentum)
    whole = cnn()
    expected = finetune(whole, batches, config, evaluate=lambda m: m[0].bias.sum().item())
    with pytest.raises(Cut):
        finetune(cnn(), cut_in_epoch(epoch), config, folder=tmp_path, evaluate=lambda m: m[0].bias.sum().item())
    torch.manual_seed(99)  # a new process has other random states
    model = cnn()
    result = finetune(model, batches, config, folder=tmp_path, evaluate=lambda m: m[0].bias.sum().item())
    assert same(state(model), state(whole))
    assert untimed(result.history) == untimed(expected.history)
    assert result.resumed == epoch - 1
    assert model[5].weight is model[3].weight
    assert [f.name for f in tmp_path.iterdir()] == [FILE_NAME]


def test_the_interrupted_model_itself_may_be_passed_again(tmp_path: Path) -> None:
    whole, model = cnn(), cnn()
    finetune(whole, batches, CONFIG)
    with pytest.raises(Cut):
        finetune(model, cut_in_epoch(2), CONFIG, folder=tmp_path)
    finetune(model, batches, CONFIG, folder=tmp_path)
    assert same(state(model), state(whole))


def test_shuffling_data_loader_resumes_too(tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(*images()), batch_size=16, shuffle=True)
    whole, model = cnn(), cnn()
    finetune(whole, loader, CONFIG)

    def stop(record: EpochRecord) -> None:
        if record.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(cnn(), loader, CONFIG, folder=tmp_path, progress=TuneProgress(stop))
    assert finetune(model, loader, CONFIG, folder=tmp_path).resumed == 2
    assert same(state(model), state(whole))


def test_finished_run_returns_at_once(tmp_path: Path) -> None:
    model, again = cnn(), cnn()
    expected = finetune(model, batches, CONFIG, folder=tmp_path)

    def never(epoch: int) -> list[tuple[Tensor, Tensor]]:
        raise AssertionError

    result = finetune(again, never, CONFIG, folder=tmp_path)
    assert same(state(model), state(again))
    assert (result.history, result.resumed) == (expected.history, 3)


SCRIPT = """
import sys, time
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
import test_resume as t

def slow(epoch):
    for step, batch in enumerate(t.batches(epoch)):
        if epoch == 1 and step == 1:
            print("in epoch 2", flush=True)
            time.sleep(60)
        yield batch

class Slow:
    def __init__(self, epoch): self.epoch = epoch
    def __len__(self): return 3
    def __iter__(self): return slow(self.epoch)

t.finetune(t.cnn(), Slow, t.CONFIG, folder=sys.argv[1])
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_process_leaves_its_last_epoch(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "run"), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"in epoch 2\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    whole, model = cnn(), cnn()
    finetune(whole, batches, CONFIG)
    assert finetune(model, batches, CONFIG, folder=tmp_path / "run").resumed == 1
    assert same(state(model), state(whole))


def test_killed_while_writing_leaves_the_former_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(record: EpochRecord) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(cnn(), batches, CONFIG, folder=tmp_path, progress=TuneProgress(stop))
    before = (tmp_path / FILE_NAME).read_bytes()
    (tmp_path / f".{FILE_NAME}.xyz.partial").mkdir()  # what a kill leaves behind
    (tmp_path / f".{FILE_NAME}.xyz.partial" / FILE_NAME).write_bytes(before[:100])

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("tenfold.tensors.tensor_file.save_file", full_disk)
        with pytest.raises(CheckpointError, match="No space left"):
            finetune(cnn(), batches, CONFIG, folder=tmp_path)
    assert (tmp_path / FILE_NAME).read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == [FILE_NAME]
    assert finetune(cnn(), batches, CONFIG, folder=tmp_path).resumed == 1


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    finetune(cnn(), batches, CONFIG.replace(epochs=1), folder=tmp_path)
    return tmp_path


def test_other_runs_are_refused(finished: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lr was 0\.05, is 0\.1.*Use another folder"):
        finetune(cnn(), batches, CONFIG.replace(epochs=1, lr=0.1), folder=finished)
    with pytest.raises(CheckpointError, match="identity was '', is 'plan 7'"):
        finetune(cnn(), batches, CONFIG.replace(epochs=1), folder=TrainingFolder(finished, "plan 7"))
    other = cnn(width=8)
    before = state(other)
    with pytest.raises(CheckpointError, match="of another model"):
        finetune(other, batches, CONFIG.replace(epochs=1), folder=finished)
    assert same(before, state(other))


def test_other_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Cut):
        finetune(cnn(), cut_in_epoch(2), CONFIG, folder=tmp_path)
    with pytest.raises(CheckpointError, match="3 steps per epoch, not 2"):
        finetune(cnn(), lambda epoch: batches(epoch)[:2], CONFIG, folder=tmp_path)
    frozen = cnn()
    frozen[0].weight.requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"'0\.weight', which does not require grad now"):
        finetune(frozen, batches, CONFIG, folder=tmp_path)


def with_header(path: Path, **changes: Any) -> bytes:
    """Return the bytes of the file with its state changed."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    stored = json.loads(header["__metadata__"]["tenfold.training"]) | changes
    header["__metadata__"]["tenfold.training"] = json.dumps(stored)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "no state", "newer", "tampered"])
def test_damaged_files_are_refused(finished: Path, damage: str) -> None:
    from safetensors.torch import save_file

    path = finished / FILE_NAME
    data = path.read_bytes()
    match damage:
        case "truncated":
            path.write_bytes(data[:-10])
        case "empty":
            path.write_bytes(b"")
        case "foreign":
            path.write_bytes(b"\x80\x04K\x01." * 100)
        case "no state":
            save_file({"a": torch.zeros(1)}, path)
        case "newer":
            path.write_bytes(with_header(path, version=99))
        case _:
            path.write_bytes(with_header(path, extra=1))
    with pytest.raises(CheckpointError, match="upgrade" if damage == "newer" else "use another folder") as caught:
        finetune(cnn(), batches, CONFIG.replace(epochs=1), folder=finished)
    assert "\n" not in str(caught.value)


def test_folder_that_cannot_be_written_fails_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        finetune(cnn(), lambda epoch: time.sleep(60), CONFIG, folder=tmp_path / "file" / "run")


def test_no_flipped_bit_is_resumed_from(tmp_path: Path) -> None:
    def stop(record: EpochRecord) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(cnn(), batches, CONFIG, folder=tmp_path, progress=TuneProgress(stop))
    raw, chance = (tmp_path / FILE_NAME).read_bytes(), random.Random(0)  # noqa: S311 - no secret
    for place in [chance.randrange(8 * len(raw)) for _ in range(60)]:
        changed = bytearray(raw)
        changed[place // 8] ^= 1 << place % 8
        (tmp_path / FILE_NAME).write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"[Dd]elete it"):
            finetune(cnn(), batches, CONFIG, folder=tmp_path)


def test_two_runs_do_not_train_in_one_folder(tmp_path: Path) -> None:
    def again(record: EpochRecord) -> None:
        with pytest.raises(FileError, match=f"is in use by process {os.getpid()}"):
            finetune(cnn(), batches, CONFIG, folder=tmp_path)

    finetune(cnn(), batches, CONFIG, folder=tmp_path, progress=TuneProgress(again))
    assert [f.name for f in tmp_path.iterdir()] == [FILE_NAME]
