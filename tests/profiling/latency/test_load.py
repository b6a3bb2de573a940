"""Under other load: what it took is noticed, and no factor is claimed that could not be measured."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tenfold.profiling import Comparison, compare_latency, measure_latency
from tenfold.profiling.latency.load import Clocks, quota
from tenfold.profiling.latency.measure import MIN_ROUNDS, compare_blocks
from tenfold.records import Latency, Speedup

MS = 1e-3
FOUR = "4 threads of other processes were busy"


@dataclass
class Machine(Clocks):
    """A made-up machine, on which time goes by only where a model works, and others get their turn in between.

    Attributes:
        count: its processors.
        threads: how many work at once.
        taken: called with the time on the wall, returns how long others keep the processor whenever a slice is over.
        busy: called with the same, returns how many others want a processor.
        tells: whether it says how long threads waited.
        slice: seconds that this process works until it is the turn of others.
        speed: called with the time, returns how much slower than at its fastest the processor is.
    """

    count: float = 2.0
    threads: int = 1
    taken: Callable[[float], float] = lambda now: 0.0
    busy: Callable[[float], int] = lambda now: 0
    tells: bool = True
    slice: float = 3 * MS
    speed: Callable[[float], float] = lambda now: 1.0
    coarse: bool = False
    _now: float = 0.0
    _used: float = 0.0
    _waited: float = 0.0
    _left: float = field(default=3 * MS)

    def wall(self) -> float:
        return self._now

    def used(self) -> float:
        tick = 0.016 if self.coarse else 1e-9
        return self._used // tick * tick

    def waited(self) -> float | None:
        return self._waited if self.tells else None

    def others(self) -> int:
        return self.busy(self._now)

    def processors(self) -> float:
        return self.count

    def spin(self) -> None:
        self.work(MS, threads=1)

    def work(self, seconds: float, *, threads: int | None = None, idle: float = 0.0) -> None:
        """Let a model work for so long; it sleeps for ``idle`` seconds besides."""
        threads = threads or self.threads
        seconds *= self.speed(self._now)
        self._now += idle
        while seconds > 0:
            step = min(seconds, self._left)
            self._now, self._used = self._now + step, self._used + threads * step
            seconds, self._left = seconds - step, self._left - step
            if self._left <= 0:
                lost = self.taken(self._now)
                self._now, self._waited, self._left = self._now + lost, self._waited + threads * lost, self.slice


class Working(nn.Module):
    """Keeps a made-up machine busy for some milliseconds."""

    def __init__(self, machine: Machine, ms: float, idle: float = 0.0) -> None:
        super().__init__()
        self.machine, self.ms, self.idle = machine, ms, idle

    def forward(self, x: Tensor) -> Tensor:
        self.machine.work(self.ms * MS, idle=self.idle * MS)
        return x


def found(
    machine: Machine, *, device: str = "cpu", idle: float = 0.0, ms: tuple[float, float] = (6.0, 0.05)
) -> Comparison:
    """Return what a model of 6 ms and one of 0.05 ms, a factor of 120, measure on a machine."""
    x = torch.zeros(2, device=device)
    models = {name: (Working(machine, own, idle), x) for name, own in zip(("slow", "fast"), ms, strict=True)}
    return compare_latency(models, seconds=1.0, threads=machine.threads, clocks=machine)


def by_turns(share: float) -> Callable[[float], float]:
    """Return how long others keep the processor at the end of a slice if they are to have a share of the time."""
    return lambda now: 3 * MS * share / (1 - share)


def test_a_quiet_machine_is_not_talked_about() -> None:
    result = found(Machine())
    speedup = result.speedups["fast"]
    assert (speedup.ratio, speedup.low, speedup.high) == pytest.approx((120, 120, 120), rel=1e-6)
    assert (speedup.clock, speedup.doubt) == ("wall", "")
    assert [(own.clock, own.load) for own in result.latencies.values()] == [("wall", "")] * 2
    assert result.latencies["slow"].median_ms == pytest.approx(6)


@pytest.mark.parametrize("tells", [True, False])
def test_beside_four_busy_processes_a_single_thread_counts_by_the_processor(tells: bool) -> None:
    result = found(Machine(taken=by_turns(0.6), busy=lambda now: 4, tells=tells))
    speedup = result.speedups["fast"]
    assert (speedup.clock, speedup.doubt) == ("processor", "")
    assert speedup.low < 0.95 * 120 < 120 * 1.05 < speedup.high < 1.5 * speedup.low
    assert speedup.ratio == pytest.approx(120, rel=0.01)
    for latency, ms in zip(result.latencies.values(), (6, 0.05), strict=True):
        assert latency.median_ms == pytest.approx(ms, rel=0.01)
        assert latency.clock == "processor"
        assert (
            latency.load == "4 threads of other processes were busy, 60 % of the processor time was taken from this one"
        )


@pytest.mark.parametrize("tells", [True, False])
def test_beside_four_busy_processes_several_threads_claim_nothing(tells: bool) -> None:
    machine = Machine(threads=2, taken=by_turns(0.6), busy=lambda now: 4, tells=tells)
    speedup = found(machine).speedups["fast"]
    assert speedup.clock == "wall"
    assert speedup.doubt.startswith(f"{FOUR}, " + ("60 %" if tells else ""))
    assert speedup.doubt.endswith("of the processor time was taken from this one")
    assert speedup.in_doubt == f"not measured: {speedup.doubt}"
    assert 0 < speedup.low <= 120 <= speedup.high < float("inf")


def test_the_processor_says_nothing_of_other_devices() -> None:
    speedup = found(Machine(taken=by_turns(0.6), busy=lambda now: 4), device="meta").speedups["fast"]
    assert (speedup.clock, bool(speedup.doubt)) == ("wall", True)


def test_bursts_cost_their_rounds_and_nothing_else() -> None:
    """Others come for a tenth of a second in every three: those rounds are left out, of both models."""
    machine = Machine(threads=2, taken=lambda now: 9 * MS * (now % 0.3 < 0.1), busy=lambda now: 4 * (now % 0.3 < 0.1))
    result = found(machine)
    speedup = result.speedups["fast"]
    assert (speedup.ratio, speedup.clock, speedup.doubt) == (pytest.approx(120), "wall", "")
    assert MIN_ROUNDS <= speedup.rounds < 50
    assert "% of the processor time was taken from this one" in result.latencies["fast"].load
    assert all(latency.high_ms == pytest.approx(latency.low_ms) for latency in result.latencies.values())


def test_what_is_in_doubt_is_measured_for_longer_and_no_longer_than_twice() -> None:
    busy_at_first = Machine(threads=2, taken=lambda now: 9 * MS * (now < 1.2), busy=lambda now: 4 * (now < 1.2))
    assert found(busy_at_first).speedups["fast"].doubt == ""
    assert 1.2 < busy_at_first.wall() < 2.2
    always = Machine(threads=2, taken=lambda now: 9 * MS, busy=lambda now: 4)
    assert found(always).speedups["fast"].doubt
    assert 2.0 < always.wall() < 2.3
    quiet = Machine(threads=2)
    found(quiet)
    assert quiet.wall() < 1.2


def test_more_threads_than_processors_are_noticed() -> None:
    machine = Machine(count=2, threads=8, taken=by_turns(0.75))
    speedup = found(machine).speedups["fast"]
    assert speedup.in_doubt == "not measured: 8 threads ran on 2 processors"
    quota = Machine(count=0.5, taken=by_turns(0.5), tells=False)
    assert found(quota).latencies["fast"].load.startswith("1 thread ran on 0.5 processors")


def test_bounds_are_given_where_they_say_something() -> None:
    """A quarter of the time waited by each of two threads: half of it may have prolonged the run."""
    machine = Machine(threads=2, taken=by_turns(0.15), busy=lambda now: 2)
    speedup = found(machine, ms=(6.0, 3.0)).speedups["fast"]
    assert speedup.in_doubt.startswith("between ")
    assert speedup.low < 2 < speedup.high


def test_a_coarse_timer_is_not_gone_by() -> None:
    """Processor time that ticks every 16 ms tells blocks of 10 ms nothing: spinning says that others run."""
    assert found(Machine(coarse=True, tells=False)).speedups["fast"].doubt == ""
    speedup = found(Machine(coarse=True, tells=False, taken=by_turns(0.6), busy=lambda now: 4)).speedups["fast"]
    assert (speedup.clock, bool(speedup.doubt)) == ("wall", True)
    spun = found(Machine(coarse=True, tells=False, taken=by_turns(0.6)))  # nobody says who runs either
    assert "of the processor time was taken from this one" in spun.speedups["fast"].doubt


def test_waiting_of_its_own_is_not_blamed_on_others() -> None:
    """A model that sleeps takes the time that it sleeps: that is no load."""
    for tells in (True, False):
        result = found(Machine(tells=tells), idle=2.0)
        assert result.speedups["fast"].ratio == pytest.approx(8 / 2.05, rel=1e-3)
        assert result.latencies["slow"].load == ""


def test_a_processor_that_changes_its_clock_rate_is_noticed() -> None:
    result = found(Machine(speed=lambda now: 1.0 if now < 0.3 else 2.0))
    assert "2.0 times slower than at its fastest" in result.latencies["slow"].load
    assert result.speedups["fast"].ratio == pytest.approx(120, rel=0.01)


def test_a_single_model_is_measured_by_the_same_rules() -> None:
    machine = Machine(taken=by_turns(0.6), busy=lambda now: 4)
    latency = measure_latency(Working(machine, 6.0), torch.zeros(2), seconds=0.5, clocks=machine)
    assert (latency.median_ms, latency.clock) == (pytest.approx(6, rel=0.01), "processor")
    assert latency.load


@pytest.mark.parametrize(
    ("slow", "share", "doubt"),
    [(60, 0.0, "the rounds differ too much"), (27, 0.0, ""), (27, 0.6, "60 % of the processor time was taken")],
)
def test_intervals_that_are_too_wide_are_in_doubt_whatever_the_reason(slow: int, share: float, doubt: str) -> None:
    """A model takes 20 ms in some rounds and more in others; processor time adds a tenth on both sides."""
    machine, generator = Machine(taken=by_turns(share)), torch.Generator().manual_seed(0)

    class Moody(Working):
        def forward(self, x: Tensor) -> Tensor:
            self.machine.work((20 + (slow - 20) * int(torch.randint(2, (), generator=generator))) * MS)
            return x

    x = torch.zeros(2)
    models = {"a": (Working(machine, 20.0), x), "b": (Moody(machine, 0.0), x)}
    found = compare_latency(models, seconds=1.0, clocks=machine).speedups["b"]
    assert (doubt in found.doubt) if doubt else not found.doubt


@pytest.mark.parametrize(
    ("files", "allowed"),
    [
        ({"cpu.max": "150000 100000"}, [1.5]),
        ({"cpu.max": "max 100000"}, []),
        ({"cpu.cfs_quota_us": "50000", "cpu.cfs_period_us": "100000"}, [0.5]),
        ({"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, []),
        ({}, []),
    ],
)
def test_quotas_of_control_groups(tmp_path: Path, files: dict[str, str], allowed: list[float]) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert quota(tmp_path) == allowed


def test_systems_that_say_nothing_are_measured_by_the_wall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tenfold.profiling.latency.load._TASKS", Path("nowhere"))
    clocks = Clocks()
    assert (clocks.waited(), clocks.others()) == (None, 0)
    assert clocks.processors() >= 0.01


def test_older_records_have_no_doubt() -> None:
    old = Speedup.from_text("{ratio: 2.0, low: 1.9, high: 2.1, rounds: 9}")
    assert (old.clock, old.doubt, old.in_doubt) == ("wall", "", "")
    latency = Latency.from_text(
        "{median_ms: 2.0, low_ms: 1.9, high_ms: 2.1, runs: 9, threads: 1, device: cpu, dtype: float32}"
    )
    assert (latency.clock, latency.load) == ("wall", "")


SPIN = "import sys\nprint(flush=True)\nwhile True: pass"


@pytest.fixture
def four_busy() -> Iterator[None]:
    """Four processes that spin on the processors that this one may use, no more than two."""
    allowed = getattr(os, "sched_getaffinity", None)
    before = allowed(0) if allowed is not None else None
    if before is not None:
        os.sched_setaffinity(0, sorted(before)[:2])  # children inherit it
    children = [subprocess.Popen([sys.executable, "-c", SPIN], stdout=subprocess.PIPE) for _ in range(4)]
    try:
        for child in children:
            assert child.stdout is not None
            child.stdout.readline()  # it runs
        yield
    finally:
        for child in children:
            child.kill()
            child.wait()
            if child.stdout is not None:
                child.stdout.close()
        if before is not None:
            os.sched_setaffinity(0, before)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes cannot be bound to processors here")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_real_measurement_beside_four_busy_processes_says_so(four_busy: None, threads: int) -> None:
    x = torch.zeros(256, 256)
    models = {"wide": (nn.Linear(256, 512), x), "slim": (nn.Linear(256, 32), x)}
    result = compare_latency(models, seconds=0.2, threads=threads)
    speedup, latency = result.speedups["slim"], result.latencies["wide"]
    assert latency.load
    assert speedup.low <= speedup.ratio <= speedup.high
    sure = speedup.high <= 1.5 * speedup.low
    assert (speedup.in_doubt == "") == sure


@pytest.mark.parametrize("busy", [False, True])
def test_times_that_a_runtime_counts_itself_are_in_doubt_beside_others(busy: bool) -> None:
    """They stay as they were counted."""
    machine = Machine(taken=by_turns(0.6 * busy), busy=lambda now: 4 * busy)

    def counting(ms: float) -> Callable[[int], float]:
        def run(number: int) -> float:
            machine.work(number * ms * MS)
            return ms * MS

        return run

    result = compare_blocks({"a": counting(6.0), "b": counting(3.0)}, seconds=0.5, clocks=machine)
    speedup = result.speedups["b"]
    assert (speedup.ratio, speedup.low, speedup.high) == pytest.approx((2, 2, 2))
    assert (bool(speedup.doubt), bool(result.latencies["a"].load)) == (busy, busy)
    assert result.speedups["a"].doubt == ""


def test_a_system_that_does_not_count_waiting_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "7").mkdir()
    monkeypatch.setattr("tenfold.profiling.latency.load._TASKS", tmp_path)
    for text, waited in (("12 3000000000 4\n", 3.0), ("0 0 0\n", None), ("nothing\n", None)):
        (tmp_path / "7" / "schedstat").write_text(text)
        assert Clocks().waited() == waited
