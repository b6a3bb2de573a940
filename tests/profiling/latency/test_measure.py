"""Latency carries its conditions; comparisons are taken in turns; intervals are what statistics says."""

from __future__ import annotations

import time
from itertools import pairwise
from math import comb
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tenfold.errors import ProfileError
from tenfold.profiling import compare_latency, environment, measure_latency
from tenfold.profiling.latency.measure import MIN_ROUNDS, median_interval
from tenfold.records import Environment, Latency


class Noting(nn.Module):
    """Writes its name down whenever it runs; takes 3 ms."""

    def __init__(self, name: str, log: list[str]) -> None:
        super().__init__()
        self.name, self.log = name, log
        self.modes: set[tuple[bool, bool]] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(self.name)
        self.modes.add((self.training, torch.is_grad_enabled()))
        time.sleep(0.003)
        return x


def test_conditions_are_recorded() -> None:
    model = nn.Conv2d(3, 4, 3).double().to(memory_format=torch.channels_last)
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64).to(memory_format=torch.channels_last)
    before = torch.get_num_threads()
    result = measure_latency(model, x, seconds=0.05, threads=2)
    assert (result.batch_size, result.threads, result.device) == (5, 2, "cpu")
    assert (result.dtype, result.memory_format, result.tf32) == ("float64", "channels_last", False)
    assert result.runs >= MIN_ROUNDS
    assert 0 < result.low_ms <= result.median_ms <= result.high_ms
    assert torch.get_num_threads() == before
    assert Latency.from_text(result.to_yaml()) == result


def test_models_are_measured_in_turns() -> None:
    log: list[str] = []
    models = {name: (Noting(name, log), torch.zeros(2)) for name in "abc"}
    models["a"][0].train()
    result = compare_latency(models, seconds=0.3)
    runs = "".join(log)
    # The last rounds: every model once per round, in an order that turns around.
    blocks = [name for i, name in enumerate(runs) if i == 0 or runs[i - 1] != name]
    assert "".join(blocks[-5:]) in {"bcbab", "cbabc", "babcb", "abcba"}
    assert all(a != b for a, b in pairwise(blocks))
    assert {mode for model, _ in models.values() for mode in model.modes} == {(False, False)}
    assert models["a"][0].training
    assert list(result.latencies) == list("abc")
    first = result.speedups["a"]
    assert (first.ratio, first.low, first.high) == (1.0, 1.0, 1.0)
    other = result.speedups["b"]
    assert other.low <= other.ratio <= other.high
    assert other.rounds == result.latencies["b"].runs


def test_a_minimum_of_rounds_is_kept_and_time_is_bounded() -> None:
    log: list[str] = []
    result = measure_latency(Noting("a", log), torch.zeros(2), seconds=0)
    assert result.runs == MIN_ROUNDS
    assert len(log) < 40


@pytest.mark.parametrize("n", [1, 2, 5, 6, 10, 25, 100])
def test_interval_of_a_median(n: int) -> None:
    low, high = median_interval(list(range(1, n + 1)))
    assert high == n + 1 - low

    def coverage(k: int) -> float:
        return 1 - 2 * sum(comb(n, i) for i in range(k)) / 2**n

    if n >= 6:
        assert coverage(int(low)) >= 0.95
        assert coverage(int(low) + 1) < 0.95
    else:
        assert (low, high) == (1, n)


def test_interval_covers_the_median_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    samples = -torch.rand(2000, 15, generator=generator).log()
    median = torch.log(torch.tensor(2.0))
    hits = sum(low <= median <= high for low, high in (median_interval(row) for row in samples.tolist()))
    assert 0.95 <= hits / 2000 < 0.98


def test_refusals() -> None:
    with pytest.raises(ProfileError, match="nothing to compare"):
        compare_latency({})
    with pytest.raises(ProfileError, match="does not run on inputs"):
        measure_latency(nn.Linear(2, 2), torch.zeros(3, 3))


def test_environment_is_complete_and_round_trips() -> None:
    found: Any = environment()
    assert found.torch == torch.__version__
    assert found.threads == torch.get_num_threads()
    assert found.versions["numpy"]
    assert found.tenfold
    assert Environment.from_text(found.to_json()) == found
