"""Work that is spread gives what one process gives: factors, tables and plans, by processes and on a local Ray."""

from __future__ import annotations

import importlib.util
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tenfold.errors import PlanError, RankError, TenfoldError, WorkerError
from tenfold.iterative import stages
from tenfold.parallel import Workers
from tenfold.pipeline import Compressed, compress
from tenfold.planning import Sensitivity
from tenfold.profiling import profile
from tenfold.records import SensitivityTable
from tenfold.runtime import Runtime
from tenfold.surgery import apply

BACKENDS = ["loky", "ray"]


@pytest.fixture(params=BACKENDS)
def workers(request: pytest.FixtureRequest) -> Workers:
    """Two workers of each kind; the Ray instance is a real one of this machine and serves the whole module."""
    if request.param == "ray":
        request.getfixturevalue("ray_instance")
    elif importlib.util.find_spec("joblib") is None:
        pytest.skip("needs joblib: pip install 'tenfold[scale]'")
    return Workers(2, request.param)


@pytest.fixture(scope="module")
def ray_instance() -> Iterator[None]:
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'tenfold[ray]'")
    if "RAY_ADDRESS" in os.environ:
        pytest.skip("RAY_ADDRESS names a cluster: tests are not for that")
    environment = {"env_vars": {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}}
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        runtime_env=environment,
    )
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute as the workers do: then results are the same to the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 24),
    ).eval()


def images(n: int = 64) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def shifted(shared: Tensor, item: int) -> tuple[Tensor, int, int]:
    if item < 0:
        msg = f"item {item} cannot be"
        raise RankError(msg)
    return shared + item, os.getpid(), torch.get_num_threads()


def test_results_come_in_order_from_other_processes(workers: Workers) -> None:
    found = list(workers.map(shifted, torch.ones(2), range(6)))
    assert [int(value[0]) for value, _, _ in found] == [1, 2, 3, 4, 5, 6]
    assert os.getpid() not in {pid for _, pid, _ in found}
    assert {threads for _, _, threads in found} == {1}
    assert list(workers.map(shifted, torch.ones(2), [])) == []


def test_errors_of_workers_are_those_of_this_process(workers: Workers) -> None:
    with pytest.raises(RankError, match="item -1 cannot be") as caught:
        list(workers.map(shifted, torch.ones(2), [1, -1]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settings", [{"jobs": 0}, {"threads": 0}, {"backend": "dask"}])
def test_settings_are_checked(settings: dict[str, int]) -> None:
    with pytest.raises(TenfoldError, match=next(iter(settings)) if "backend" not in settings else "dask"):
        Workers(**settings)


def test_one_job_stays_here() -> None:
    assert [pid for _, pid, _ in Workers().map(shifted, torch.ones(1), [1, 2])] == [os.getpid()] * 2


@cache
def compressed_here() -> Compressed:
    """Return what one process gives, by the weights alone."""
    return compress(net(), images(1), "macs=0.5", runtime=Runtime(measure=False))


def test_factors_are_the_same_to_the_last_bit(workers: Workers) -> None:
    result = compressed_here()
    assert len(result.plan.factorized) >= 2
    assert bits(apply(net(), result.plan, workers=workers)) == bits(result.model)


@cache
def planned(workers: Workers) -> Compressed:
    recipe = {"budget": {"macs": 0.5}, "calibration": {"method": "independent"}}
    return compress(net(), images(1), recipe, data=[images()], runtime=Runtime(workers=workers, measure=False))


def test_a_planned_run_gives_the_same_plan_and_model(workers: Workers) -> None:
    expected, found = planned(Workers()), planned(workers)
    assert found.plan.to_yaml() == expected.plan.to_yaml()
    assert bits(found.model) == bits(expected.model)


@cache
def staged(workers: Workers) -> tuple[list[str], dict[str, bytes]]:
    plans, model = [], net()
    how = Runtime(workers=workers)
    for stage in stages(model, images(1), "macs=0.5", {"rounds": 2}, data=[images()], runtime=how):
        plans.append(stage.plan.to_yaml())
        model = stage.model
    return plans, bits(model)


def test_a_staged_run_gives_the_same_plans_and_model(workers: Workers) -> None:
    expected = staged(Workers())
    assert len(expected[0]) == 2
    assert staged(workers) == expected


def table(workers: Workers | None, path: Path | None = None) -> Sensitivity:
    x = images(16)
    return Sensitivity(
        net(),
        profile(net(), x[:1]),
        {"calibration": {"method": "batchnorm"}},
        evaluate=lambda model: float(model(x).detach().abs().mean()),
        batches=[x],
        path=path,
        workers=workers,
    )


@cache
def table_here() -> SensitivityTable:
    return table(None).measure(3, scores=True)


def test_a_sensitivity_table_is_the_same_and_kept_as_it_grows(workers: Workers, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    expected = table_here()
    found = table(workers, tmp_path / "table.json").measure(3, scores=True, progress=lambda *now: seen.append(now))
    assert found == expected
    assert seen[-1][0] == seen[-1][1] == sum(len(layer.points) for layer in found.layers) * 2
    again = table(None, tmp_path / "table.json")
    assert again.table == expected


def test_an_error_names_its_layer(workers: Workers) -> None:
    model = net()
    plan = compressed_here().plan
    path = plan.factorized[0].path
    with torch.no_grad():
        model.get_submodule(path).weight[0] = float("nan")
    with pytest.raises(PlanError, match=f"layer '{path}': the weight has"):
        apply(model, plan, workers=workers)


def deadly(shared: Path, item: int) -> int:
    if item == 2 and shared:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def hungry(shared: None, item: int) -> float:
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))
    return float(torch.ones(item).sum())


@pytest.mark.skipif(importlib.util.find_spec("joblib") is None, reason="needs joblib: pip install 'tenfold[scale]'")
def test_a_worker_that_dies_ends_the_work_with_an_error() -> None:
    with pytest.raises(WorkerError, match="a worker died"):
        list(Workers(2).map(deadly, True, range(6)))
    assert list(Workers(2).map(deadly, False, range(6))) == list(range(6))


@pytest.mark.skipif(importlib.util.find_spec("joblib") is None, reason="needs joblib: pip install 'tenfold[scale]'")
def test_a_worker_without_memory_says_so() -> None:
    with pytest.raises(WorkerError, match=r"no memory left.*fewer jobs"):
        list(Workers(2).map(hungry, None, [1, 10**10, 1]))


@pytest.mark.skipif(importlib.util.find_spec("joblib") is None, reason="needs joblib: pip install 'tenfold[scale]'")
def test_workers_end_with_their_parent_and_leave_nothing(tmp_path: Path) -> None:
    code = (
        "import os, time\nfrom pathlib import Path\nfrom tenfold.parallel import Workers\n"
        "def work(shared, item):\n"
        "    (Path('pids') / str(os.getpid())).touch()\n"
        "    time.sleep(60)\n"
        "list(Workers(2).map(work, None, range(4)))\n"
    )
    (tmp_path / "pids").mkdir()
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "TMPDIR": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environ)
    while len(pids := list((tmp_path / "pids").iterdir())) < 2:
        assert parent.poll() is None
        time.sleep(0.1)
    assert list(tmp_path.glob("tenfold-*"))
    parent.kill()
    parent.wait()
    end = time.monotonic() + 30
    while any(_lives(int(pid.name)) for pid in pids) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(_lives(int(pid.name)) for pid in pids)
    assert list(tmp_path.glob("tenfold-*")) == []


def _lives(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    except OSError:
        return False
