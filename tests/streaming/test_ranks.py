"""Processes that share the samples of a streamed run find what one finds."""

from __future__ import annotations

import copy
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tenfold
from benchmarks.streaming.ray_workers import killer
from tenfold import Runtime, Workers
from tenfold.calibration.collect import collect_moments
from tenfold.calibration.gradients import GradientSums
from tenfold.calibration.shares import Share
from tenfold.checkpoint import load_pretrained
from tenfold.cli import app as cli
from tenfold.decompositions import Sketch
from tenfold.errors import DataError
from tenfold.records import LayerSpec
from tenfold.streaming import Streamed, compress_streamed
from tenfold.streaming.ranks import Ranks
from tests.language import folder, small_llama, texts
from tests.streaming.test_stream import Net, given


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def in_two_processes(work: Callable[[Any], Any], folder: Path) -> None:
    """Run something in two processes that an Accelerator connects, as a launch does."""
    children, port = [], free_port()
    for index in range(2):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ |= {
                    "RANK": str(index), "WORLD_SIZE": "2", "LOCAL_RANK": str(index), "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true",
                }  # fmt: skip
                torch.set_num_threads(1)
                from accelerate import Accelerator
                from accelerate.state import AcceleratorState

                AcceleratorState._reset_state(reset_partial_state=True)

                work(Accelerator(cpu=True))
                torch.distributed.destroy_process_group()
                code = 0
            except BaseException as error:  # noqa: BLE001 - a child of a test must not go on in the test
                (folder / f"error-{index}.txt").write_text(repr(error))
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0, 0], [path.read_text() for path in folder.glob("error-*.txt")]


@pytest.mark.parametrize("changes", [{}, {"max_width": 32}], ids=["exact", "sketched"])
def test_two_processes_find_what_one_finds(tmp_path: Path, changes: dict[str, Any]) -> None:
    _, weights, data, empty = given(tmp_path)
    recipe = {"budget": "params=0.6", "calibration": changes}

    def run(out: Path, **runtime: Any) -> Streamed:
        return compress_streamed(weights, out, recipe, data=data, skeleton=empty, runtime=Runtime(**runtime))

    alone = run(tmp_path / "alone")
    in_two_processes(lambda own: run(tmp_path / "together", accelerator=own), tmp_path)
    (first, plan), (second, other) = (tenfold.load(Net(), tmp_path / name) for name in ("alone", "together"))
    assert [(layer.path, layer.format, layer.rank) for layer in other.layers] == [
        (layer.path, layer.format, layer.rank) for layer in plan.layers
    ]
    assert other.after == alone.plan.after
    torch.testing.assert_close(second(data[0]), first(data[0]), rtol=1e-4, atol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "dense", "together"]


def test_the_command_in_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "model", small_llama(hidden_size=48, intermediate_size=96))
    (tmp_path / "texts.txt").write_text(texts(100, 1))
    monkeypatch.chdir(tmp_path)
    asked = ["stream", "model", "--data", "texts.txt", "--budget", "params=0.8", "--calibration-samples", "32"]

    def command(_: Any) -> None:
        assert cli.run([*asked, "--tokens", "16", "--out", "small", "-q"]) == 0

    in_two_processes(command, tmp_path)
    assert load_pretrained(tmp_path / "small").config.hidden_size == 48
    assert not list(tmp_path.glob(".small*"))


class Threads:
    """What ``Together`` is for processes, for two threads of this one."""

    def __init__(self) -> None:
        self.values: dict[int, Any] = {}
        self.barrier = threading.Barrier(2, timeout=60)

    def of(self, index: int) -> Any:
        return _Thread(self, index)


class _Thread:
    def __init__(self, both: Threads, index: int) -> None:
        self.both, self.index = both, index

    def everyones(self, value: Any) -> list[Any]:
        self.both.values[self.index] = value
        self.both.barrier.wait()
        found = [self.both.values[0], self.both.values[1]]
        self.both.barrier.wait()
        return found

    def summed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        first, second = self.everyones({name: tensor.clone() for name, tensor in tensors.items()})
        return {name: sum(own[name] for own in (first, second) if name in own) for name in sorted({*first, *second})}  # type: ignore[misc]


class Attention(nn.Module):
    """Two layers that share an input, one that is reached by some batches only, maps, and words."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.conv, self.strided = nn.Embedding(9, 8), nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(4, 4, 2)
        self.q, self.k, self.rare = nn.Linear(12, 6), nn.Linear(12, 3), nn.Linear(6, 6)

    def forward(self, ids: Tensor) -> Tensor:
        maps = self.strided(self.conv(self.words(ids).movedim(-1, 1))).flatten(2)
        x = maps.repeat(1, 1, 3)[..., :12]
        y, z = self.q(x), self.k(x)
        y = self.rare(y) if int(ids[0, 0, 0]) == 0 else y
        return torch.cat([y, z], -1)


def in_threads(work: Callable[[int, Any], Any]) -> list[Any]:
    both, found = Threads(), dict[int, Any]()
    threads = [
        threading.Thread(target=lambda i=index: found.update({i: work(i, both.of(i))}), daemon=True)
        for index in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [found[0], found[1]]


@pytest.mark.parametrize("options", [{}, {"positions": 3}, {"widest": 8}, {"widest": 10_000}], ids=str)
def test_moments_of_shares_are_those_of_all(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, batches = Attention(), list(torch.randint(0, 9, (8, 3, 4, 4)))
    for batch in batches[::2]:
        batch[0, 0, 0] = 0  # the layer that is rare is seen by one process alone
    whole = collect_moments(model, batches, **options)
    places = [[0, 2, 4, 6], [1, 3, 5, 7]]

    def share(index: int, together: Any) -> dict[str, Any]:
        own = Share([batches[i] for i in places[index]], places[index], together)
        return collect_moments(copy.deepcopy(model), own, **options)

    for found in in_threads(share):
        assert found.keys() == whole.keys()
        assert found["q"].input_second_moment is found["k"].input_second_moment
        for path, own in found.items():
            assert own.count == whole[path].count
            torch.testing.assert_close(own.mean, whole[path].mean)
            torch.testing.assert_close(dense(own), dense(whole[path]), rtol=1e-5, atol=1e-7)


def dense(moments: Any) -> Tensor:
    square = moments.input_second_moment
    return square.sandwich(torch.eye(moments.width).double()[None]) if isinstance(square, Sketch) else square


@pytest.mark.parametrize("widest", [None, 4])
def test_gradients_of_shares_are_those_of_all(widest: int | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 3))
    specs = {
        path: LayerSpec(kind="linear", in_channels=n, out_channels=m) for path, n, m in (("0", 5, 12), ("2", 12, 3))
    }
    batches, gradients = torch.randn(8, 4, 5), torch.randn(8, 4, 3)

    def sums(numbers: Sequence[int], together: Any = None) -> dict[str, Any]:
        own = copy.deepcopy(model)
        with GradientSums(own, specs, widest=widest) as found:
            for number in numbers:
                found.add_sent_back(own, batches[number], gradients[number])
            if together is not None:
                found.gather(together)
            assert found.samples == 32
            return {
                path: gram.sandwich(torch.eye(n).double()[None]) if isinstance(gram, Sketch) else gram
                for n, (path, gram) in zip((12, 3), found.mean().items(), strict=True)
            }

    whole = sums(range(8))
    for found in in_threads(lambda index, together: sums(range(index, 8, 2), together)):
        for path, gram in found.items():
            torch.testing.assert_close(gram, whole[path], rtol=1e-5, atol=1e-7)


def test_too_few_batches_for_the_processes() -> None:
    assert Ranks(1, 2).dealt([0, 2, 3], [1, 4], 6).own(range(6)) == [2, 4]
    with pytest.raises(DataError, match="for 2 processes: pass 32 or more"):
        Ranks(1, 2).dealt([0, 2, 3], [1], 4)


@pytest.fixture
def ray_instance() -> Iterator[Any]:
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'tenfold[ray]'")
    if "RAY_ADDRESS" in os.environ:
        pytest.skip("RAY_ADDRESS names a cluster: tests are not for that")
    environment = {"env_vars": {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}}
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    ray.init(address="local", num_cpus=2, runtime_env=environment, **quiet)
    yield ray
    ray.shutdown()


def test_an_actor_that_dies_changes_nothing(tmp_path: Path, ray_instance: Any) -> None:
    _, weights, data, empty = given(tmp_path)
    killed: list[int] = []

    def run(out: Path, runtime: Runtime) -> Streamed:
        return compress_streamed(weights, out, "params=0.6", data=data, skeleton=empty, runtime=runtime)

    alone = run(tmp_path / "alone", Runtime())
    found = run(tmp_path / "ray", Runtime(workers=Workers(2, "ray"), on_event=killer(killed, done=2)))
    assert killed
    assert [(layer.path, layer.format, layer.rank) for layer in found.plan.layers] == [
        (layer.path, layer.format, layer.rank) for layer in alone.plan.layers
    ]
    (first, _), (second, _) = (tenfold.load(Net(), own.path) for own in (alone, found))
    torch.testing.assert_close(second(data[0]), first(data[0]), rtol=1e-4, atol=1e-4)
