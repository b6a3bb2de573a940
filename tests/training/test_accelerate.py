"""Fine-tuning under Hugging Face Accelerate: one process is as before, two are one with the doubled batch."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from tenfold.errors import CheckpointError, DataError, TuningError
from tenfold.training import TrainingFolder, TuneConfig, TuneProgress, finetune
from tenfold.training.batches import share
from tenfold.training.ema import Average
from tenfold.training.snapshot import Snapshot

accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install 'tenfold[scale]'")

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("launched", Path(__file__).with_name("launched.py"))
assert _spec is not None
assert _spec.loader is not None
launched: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(launched)


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Return what ``accelerate launch`` says of two processes on the CPU."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    settings = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(
        [*command, *settings, *arguments], capture_output=True, text=True, env=environment, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that two processes have filled."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("two")
    done = launch(str(Path(__file__).with_name("launched.py")), str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", ["doubled", "accumulated"])
def test_two_processes_reach_what_one_reaches_with_the_doubled_batch(two: Path, name: str) -> None:
    found = json.loads((two / "found.json").read_text())
    assert found["processes"] == 2
    assert found[name]["same"]
    model = launched.mlp()
    told = finetune(model, launched.batches_of(16), launched.PLAIN)
    assert found[name]["losses"] == pytest.approx([r.loss for r in told.history], rel=1e-5)
    for key, tensor in load_file(two / f"{name}.safetensors").items():
        torch.testing.assert_close(tensor, model.state_dict()[key], rtol=1e-4, atol=1e-6)


def test_two_processes_resume_to_the_same_bits(two: Path) -> None:
    found = json.loads((two / "found.json").read_text())
    assert found["resumed"]["resumed"] == 1
    assert found["whole"]["same"]  # batch norm saw other samples in each process, and dropout other masks
    assert found["resumed"]["same"]
    assert found["whole"]["scores"] == found["resumed"]["scores"]
    whole, resumed = load_file(two / "whole.safetensors"), load_file(two / "resumed.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert found["whole"]["seen"] == 3
    assert [f.name for f in (two / "whole").iterdir()] == ["tuning.safetensors"]


def test_the_model_knows_nothing_of_the_accelerator_afterwards(two: Path) -> None:
    assert json.loads((two / "found.json").read_text())["doubled"]["plain"] == []


def test_each_sample_of_a_loader_goes_to_one_process_and_the_first_batches_fill_the_last_round(two: Path) -> None:
    one, other = json.loads((two / "found.json").read_text())["loader"]["drawn"]
    # 44 samples in batches of 8: five full ones and one of 4, three for each process.
    assert (len(one), len(other)) == (24, 20)
    assert sorted(one + other) == list(range(44))


def test_shares_are_equal_in_number_and_drawn_alike() -> None:
    batches = [(torch.tensor([i]), None) for i in range(5)]
    one, other = list(share(batches, 0, 2)), list(share(batches, 1, 2))
    assert [int(b[0]) for b in one] == [0, 2, 4]
    assert [int(b[0]) for b in other] == [1, 3, 0]
    assert [[int(b[0]) for b in share(batches[:1], i, 3)] for i in range(3)] == [[0], [0], [0]]
    assert list(share([], 1, 2)) == []

    def drawn() -> Iterator[Any]:
        yield from ((torch.rand(1), None) for _ in range(4))

    torch.manual_seed(3)
    expected = [x for x, _ in drawn()]
    found = {}
    for index in (0, 1):
        torch.manual_seed(3)
        mine = share(drawn(), index, 2)
        torch.manual_seed(index)  # training draws too, and in each process otherwise
        found[index] = [(x, torch.rand(index + 1))[0] for x, _ in mine]
    assert [*found[0], *found[1]] == [expected[i] for i in (0, 2, 1, 3)]


def test_what_is_divided_up_already_is_refused() -> None:
    data = TensorDataset(torch.zeros(8, 2))
    loader = DataLoader(data, sampler=DistributedSampler(data, num_replicas=2, rank=0))
    with pytest.raises(DataError, match="divided up"):
        share(loader, 0, 2)


def test_a_folder_of_more_processes_is_refused(two: Path) -> None:
    config = launched.PLAIN.replace(ema=0.9)
    with pytest.raises(CheckpointError, match="processes were 2, are 1"):
        finetune(launched.mlp(norm=True), launched.noisy, config, folder=two / "whole")
    assert Snapshot(TrainingFolder(two / "whole"), config, processes=2).read() is not None


# --- one process ---


@pytest.fixture
def one() -> Iterator[Any]:
    """Make accelerators of one process on the CPU, and leave no trace: accelerate keeps its state globally."""
    from accelerate.state import AcceleratorState

    def make(**settings: Any) -> Any:
        AcceleratorState._reset_state(reset_partial_state=True)
        return accelerate.Accelerator(cpu=True, **settings)

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)


def test_one_accelerated_process_is_the_plain_loop_to_the_last_bit(one: Any, tmp_path: Path) -> None:
    plain, model = launched.mlp(norm=True), launched.mlp(norm=True)
    expected = finetune(plain, launched.noisy, launched.PLAIN)
    accelerator = one()
    told = finetune(model, launched.noisy, launched.PLAIN, accelerator=accelerator, folder=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), model.state_dict().values(), strict=True))
    assert [r.loss for r in told.history] == [r.loss for r in expected.history]
    assert vars(model).keys() == vars(plain).keys()
    assert accelerator._models == accelerator._optimizers == []
    again = launched.mlp(norm=True)  # a run of one process is that of any other
    assert finetune(again, launched.noisy, launched.PLAIN, folder=tmp_path).resumed == 3
    assert torch.equal(again[0].weight, plain[0].weight)


def test_mixed_precision_is_that_of_the_accelerator(one: Any) -> None:
    seen = []

    def loss(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        hook = model[0].register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
        value = nn.functional.cross_entropy(model(inputs).float(), targets)
        hook.remove()
        return value

    model = launched.mlp()
    accelerator = one(mixed_precision="bf16")
    told = finetune(model, launched.batches_of(16), launched.PLAIN, accelerator=accelerator, loss=loss)
    assert set(seen) == {torch.bfloat16}
    assert model[0].weight.dtype == torch.float32
    assert told.history[-1].loss < told.history[0].loss
    assert model(torch.zeros(1, 2)).dtype == torch.float32
    assert "forward" not in vars(model)


def test_accelerators_that_the_loop_cannot_serve_are_refused(one: Any) -> None:
    with pytest.raises(TuningError, match=r"TuneConfig\(accumulate=4\)"):
        finetune(launched.mlp(), [], accelerator=one(gradient_accumulation_steps=4))


def made_up(kind: str, *, gathered: tuple[int, ...] = (0,)) -> Any:
    """Return what stands for an accelerator of a cluster that a test cannot have."""
    return SimpleNamespace(
        gradient_accumulation_steps=1,
        distributed_type=accelerate.DistributedType[kind],
        process_index=0,
        num_processes=len(gathered),
        mixed_precision="no",
        device=torch.device("cpu"),
        gather=lambda _: torch.tensor(gathered),
    )


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_models_in_pieces_are_refused(kind: str) -> None:
    with pytest.raises(TuningError, match=f"set up for {kind}"):
        finetune(launched.mlp(), [], accelerator=made_up(kind))


def test_a_folder_that_not_all_machines_see_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="find 2, 0 epochs"):
        finetune(launched.mlp(), [], accelerator=made_up("MULTI_CPU", gathered=(2, 0)), folder=tmp_path)


# --- accumulation and the average of the weights ---


def test_accumulated_batches_are_one_large_batch() -> None:
    large, small = launched.mlp(), launched.mlp()
    expected = finetune(large, launched.batches_of(32), launched.PLAIN)
    told = finetune(small, launched.batches_of(8), launched.PLAIN.replace(accumulate=4))
    assert [r.loss for r in told.history] == pytest.approx([r.loss for r in expected.history], rel=1e-5)
    assert [r.lr for r in told.history] == [r.lr for r in expected.history]
    for a, b in zip(large.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_last_step_of_an_epoch_may_have_fewer_batches() -> None:
    batches = launched.batches_of(16)(0)[:3]
    ours, theirs = launched.mlp(), launched.mlp()
    config = TuneConfig(
        epochs=1, lr=0.1, momentum=0, weight_decay=0, clip_norm=None, warmup=0, autocast="off", accumulate=2
    )
    finetune(ours, batches, config)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=1.0)
    for rate, part in ((0.1, batches[:2]), (0.1 * (1 + torch.cos(torch.tensor(torch.pi / 2)).item()) / 2, batches[2:])):
        for x, y in part:
            (nn.functional.cross_entropy(theirs(x), y) / len(part)).backward()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_average_is_scored_and_is_what_the_model_ends_with() -> None:
    plain, model = launched.mlp(norm=True), launched.mlp(norm=True)
    scored: list[torch.Tensor] = []
    finetune(plain, launched.noisy, launched.PLAIN)

    def score(candidate: nn.Module) -> float:
        scored.append(candidate[0].weight.detach().clone())
        return 0.0

    told = finetune(model, launched.noisy, launched.PLAIN.replace(ema=0.9), evaluate=score)
    assert torch.equal(scored[-1], model[0].weight)
    assert not torch.equal(model[0].weight, plain[0].weight)
    assert told.history[-1].loss == finetune(launched.mlp(norm=True), launched.noisy, launched.PLAIN).history[-1].loss

    expected, copy = Average(again := launched.mlp(), 0.9), again[0].weight.detach().clone()
    for number, value in enumerate((2.0, 4.0)):
        nn.init.constant_(again[0].weight, value)
        expected.update_(again, number)
    # 0.1 of the start stays at the first update, 2/11 of that at the second
    by_hand = (2 / 11) * (0.1 * copy + 0.9 * 2.0) + (9 / 11) * 4.0
    torch.testing.assert_close(expected.tensors["0.weight"], by_hand)


def test_the_average_resumes_to_the_same_bits(tmp_path: Path) -> None:
    config = launched.PLAIN.replace(ema=0.9)
    whole, model, finished = (launched.mlp(norm=True) for _ in range(3))
    finetune(whole, launched.noisy, config)

    def stop(record: Any) -> None:
        if record.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(launched.mlp(norm=True), launched.noisy, config, folder=tmp_path, progress=TuneProgress(stop))
    assert finetune(model, launched.noisy, config, folder=tmp_path).resumed == 2
    assert finetune(finished, launched.noisy, config, folder=tmp_path).resumed == 3
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
        assert torch.equal(tensor, finished.state_dict()[name]), name
