"""What else a machine does while something is measured: clocks beside the one on the wall, and what they say of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median, median_low
from typing import Any

NOTICED = 0.02  # of the processor time: what less than this was taken is what a quiet machine takes too
_COARSE = 2e-4  # seconds: blocks of 10 ms cannot be told apart by a clock of processor time that ticks slower
_HELD_UP = 0.10  # of the time of the spins: where they lose more, others run too
_DRIFT = 1.25  # how much more processor time half of the spins take than the fastest, where the clock rate changes
_LEAST = 0.01  # of a time is the model's own, whatever its threads waited: bounds of ratios stay finite
_WORKING = 0.5  # of what spinning works in the same time: a model that works less waits for something else
_ONE = 1.2  # processor time by time on the wall: of a single thread it is 1 at most, but for readings
_SPINS = 20_000  # additions, about a millisecond
_TASKS, _CGROUPS = Path("/proc/self/task"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Block:
    """Seconds of one run, by three clocks.

    Attributes:
        wall: from beginning to end.
        used: processor time of all threads of this process.
        waited: how long its threads were ready to run and had no processor, all threads together; None where the
            system does not say.
    """

    wall: float
    used: float
    waited: float | None = None

    @property
    def undisturbed(self) -> float:
        """About what it takes while nothing else runs."""
        return min(self.wall, max(self.used, self.wall - (self.waited or 0.0)))


@dataclass(frozen=True)
class Span:
    """Seconds that a run takes when nothing else does: at least and at most."""

    least: float
    most: float

    @property
    def disturbed(self) -> float:
        """The share of the time that others may have had."""
        return 1 - self.least / self.most


def _ticks(clock: Any) -> bool:
    """Whether a clock ticks too slowly; that of Windows does so every 16 ms, whatever it says."""
    return clock.resolution > _COARSE or "GetProcessTimes" in clock.implementation


class Clocks:
    """What tells the time of a measurement. Tests put others in its place."""

    coarse = _ticks(time.get_clock_info("process_time"))

    def wall(self) -> float:
        """Return seconds on the wall."""
        return time.perf_counter()

    def used(self) -> float:
        """Return the processor time of all threads of this process, in seconds."""
        return time.process_time()

    def waited(self) -> float | None:
        """Return how long the threads of this process were ready and had no processor, in seconds, or None.

        The second number of schedstat (Linux, Documentation/scheduler/sched-stats.rst).
        """
        total = slices = 0
        try:
            for thread in _TASKS.iterdir():
                with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
                    _, waited, own = (thread / "schedstat").read_bytes().split()
                    total, slices = total + int(waited), slices + int(own)
        except (OSError, ValueError):
            return None
        return total / 1e9 if slices else None  # a system that does not count says 0

    def others(self) -> int:
        """Return how many threads of other processes want a processor now; 0 where the system does not say."""
        try:
            stat = Path("/proc/stat").read_text()
            running = int(stat.split("procs_running")[1].split()[0])
            own = sum(_runs(thread) for thread in _TASKS.iterdir())
        except (OSError, ValueError, IndexError):
            return 0
        return max(0, running - own)

    def processors(self) -> float:
        """Return how many processors this process may use, by its affinity and the quotas of its control group."""
        allowed = getattr(os, "sched_getaffinity", None)
        count = float(len(allowed(0)) if allowed is not None else os.cpu_count() or 1)
        return min([count, *_quotas()])

    def spin(self) -> None:
        """Work for about a millisecond in one thread: always the same, so its time tells what the machine does."""
        total = 0
        for number in range(_SPINS):
            total += number

    def block(self, work: Callable[[], object], runs: int) -> Block:
        """Return the time of one run, where ``work`` does so many."""
        waited, used, wall = self.waited(), self.used(), self.wall()
        work()
        wall, used, after = self.wall() - wall, self.used() - used, self.waited()
        lost = None if waited is None or after is None else max(0.0, after - waited) / runs
        return Block(wall / runs, used / runs, lost)


def _runs(thread: Path) -> bool:
    with suppress(OSError):
        return (thread / "stat").read_text().rpartition(")")[2].split()[0] == "R"
    return False


def _quotas() -> list[float]:
    """Return the processors that each control group over this process allows, where one limits them."""
    found: list[float] = []
    with suppress(OSError, ValueError):
        own = Path("/proc/self/cgroup").read_text().splitlines()
        names = {Path(line.split(":", 2)[2].lstrip("/")) for line in own}
        for folder in {parent for name in names for parent in (name, *name.parents)}:
            for place in (_CGROUPS / folder, _CGROUPS / "cpu" / folder):
                found += quota(place)
    return found


def quota(folder: Path) -> list[float]:
    """Return the processors that a control group of version 2 or 1 allows; empty where it does not limit them.

    Example:
        >>> quota(Path("nowhere"))
        []
    """
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        with suppress(OSError, ValueError):  # "max" is no number
            quota, period = " ".join((folder / name).read_text() for name in files).split()
            return [int(quota) / int(period)] if int(quota) > 0 else []
    return []


@dataclass
class Watch:
    """What is seen of the machine between the rounds of a measurement.

    Attributes:
        clocks: that tell the time.
        threads: how many the models use.
        spins: times of the same work in one thread, round by round.
        busy: threads of other processes that wanted a processor, round by round.
    """

    clocks: Clocks
    threads: int
    spins: list[Block] = field(default_factory=list)
    busy: list[int] = field(default_factory=list)

    def look(self) -> None:
        """Spin once, and count who else runs."""
        self.spins.append(self.clocks.block(self.clocks.spin, 1))
        self.busy.append(self.clocks.others())

    @property
    def others(self) -> int:
        """How many threads of other processes wanted a processor, in half of the rounds at least."""
        return median_low(self.busy) if self.busy else 0

    @property
    def held_up(self) -> float:
        """The share of the time of the spins that they were held up, going by the fastest of them."""
        walls = [spin.wall for spin in self.spins] or [1.0]
        return 1 - min(walls) / mean(walls)

    @property
    def contended(self) -> bool:
        """Whether others held this process up, as far as that is known without its waiting times."""
        return self.held_up > _HELD_UP or self.others + self.threads > self.clocks.processors()

    def spans(self, blocks: Sequence[Block], *, alone: bool) -> list[Span]:
        """Return the bounds of the undisturbed time of every block of a model.

        A run is prolonged by no more than its threads waited for a processor. What a single thread neither ran nor
        waited is the model's own idling as far as three blocks of four have it; the rest was taken by a quota, or by
        the host of a virtual machine.

        Args:
            blocks: of one model.
            alone: whether it works in a single thread and nowhere else; then the lower bound is what it takes.
        """
        waited = [block.waited for block in blocks if block.waited is not None]
        if alone and waited:
            idle = sorted(1 - (b.used + own) / b.wall for b, own in zip(blocks, waited, strict=True))
            own = max(0.0, idle[len(idle) // 4])
            waited = [(1 - own) * block.wall - block.used for block in blocks]
        elif not waited:
            waited = [block.wall - block.used * alone if self.contended else 0.0 for block in blocks]
        return [
            Span(min(block.wall, max(_LEAST * block.wall, block.wall - lost)), block.wall)
            for block, lost in zip(blocks, waited, strict=True)
        ]

    def alone(self, blocks: Sequence[Block]) -> bool:
        """Whether a model works in a single thread of this process, so that processor time tells what it takes."""
        if self.clocks.coarse or self.threads > 1 or max(block.used / block.wall for block in blocks) > _ONE:
            return False
        working, spinning = (
            sum(min(block.wall, block.used + (block.waited or 0.0)) for block in own) / sum(block.wall for block in own)
            for own in (blocks, self.spins)
        )
        return working > _WORKING * spinning

    def in_words(self, blocks: Sequence[Block], spans: Sequence[Span], *, alone: bool) -> str:
        """Return what else the machine did and how much of the processor's time that took; empty where it was quiet.

        Args:
            blocks: of all models.
            spans: what ``spans`` made of them.
            alone: see ``spans``.
        """
        allowed, reasons = self.clocks.processors(), []
        if self.threads > allowed:
            where = _number(allowed, "processor", "processors")
            reasons.append(f"{_number(self.threads, 'thread', 'threads')} ran on {where}")
        if self.others:
            busy = _number(self.others, "thread of another process was", "threads of other processes were")
            reasons.append(f"{busy} busy")
        taken = self._taken(blocks, spans, alone=alone)
        if taken > NOTICED and (self.others or self.threads <= allowed):
            reasons.append(f"{taken:.0%} of the processor time was taken from this one".replace("%", " %"))
        if alone and not self.clocks.coarse and self._slowdown > _DRIFT:
            reasons.append(f"the processor was up to {self._slowdown:.1f} times slower than at its fastest")
        return ", ".join(reasons)

    @property
    def _slowdown(self) -> float:
        used = [spin.used for spin in self.spins]
        return median(used) / min(used) if min(used, default=0.0) else 1.0

    def _taken(self, blocks: Sequence[Block], spans: Sequence[Span], *, alone: bool) -> float:
        waited = [block.waited for block in blocks if block.waited is not None]
        if alone:
            return 1 - sum(span.least for span in spans) / sum(span.most for span in spans)
        if len(waited) == len(blocks):
            return sum(waited) / (sum(waited) + sum(block.used for block in blocks) or 1.0)
        return self.held_up if self.contended else 0.0


def _number(count: float, one: str, many: str) -> str:
    return f"{count:.3g} {one if count == 1 else many}"
