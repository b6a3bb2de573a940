"""How a compression is carried out: workers, clock, files and progress, on none of which its result depends."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold.parallel import Workers
from tenfold.progress import Event, Pace, ProgressBar
from tenfold.progress import logger as progress_log
from tenfold.records import parse_size

if TYPE_CHECKING:
    from accelerate import Accelerator

    from tenfold.profiling import LatencyTable


logger = logging.getLogger("tenfold")

OnEvent = Callable[[Event], None]


@dataclass(frozen=True, eq=False)
class Runtime:
    """How the machine does what a ``Recipe`` asks for. The defaults suit one process; the result is the same.

    Use one for a progress bar, several processes, no measurements, or a folder for runs that may be killed.

    Attributes:
        workers: who does what falls into independent layers: this process, or several.
        clock: times layers for a latency budget; one for the model's device and dtype if None.
        measure: measure original and result, interleaved, at the end.
        latency_inputs: what latencies are measured on, such as a larger batch; the example inputs if None.
        cache: file in which errors of trial fits are kept from run to run, for rules that search (``error``).
        folder: where a run in stages is kept, and the blocks that ``calibration.refine`` has refined; the same call
            then goes on where it was killed.
        identity: whatever else the outcome of such a run depends on, such as the loss, in any words; a folder of
            another one is refused.
        max_cache: bytes of activations that sequential fits hold of each of the two models, as a number or such as
            ``"512MiB"``; beyond that they are computed again. 4 GiB if None, and 16 MiB in ``compress_streamed``.
        max_memory: bytes that this process may take at most in ``compress_streamed``, such as ``"8GB"``; others leave
            it aside. ``max_cache`` is lowered for it, and where that is not enough wide inputs are sketched, which
            changes the result.
        progress: show a bar on standard error, on terminals and in notebooks. Steps, layers and the time left are in
            the log as well: ``logging.getLogger("tenfold")`` at INFO, at least every half a minute; at DEBUG, each.
        on_event: called with every ``Event``.
        accelerator: an ``accelerate.Accelerator()``, whose processes share the samples of ``compress_streamed``.

    Example:
        >>> steps = []
        >>> with Runtime(on_event=lambda event: steps.append(event.step)).step("plan"):
        ...     pass
        >>> steps
        ['plan']
    """

    workers: Workers = field(default_factory=Workers)
    clock: LatencyTable | None = None
    measure: bool = True
    latency_inputs: Any = None
    cache: str | Path | None = None
    folder: str | Path | None = None
    identity: str = ""
    max_cache: int | str | None = None
    max_memory: int | str | None = None
    progress: bool = False
    on_event: OnEvent | None = None
    accelerator: Accelerator | None = None
    _bar: ProgressBar = field(default_factory=ProgressBar, init=False, repr=False)

    def __post_init__(self) -> None:
        """Raise RecipeError for a size that cannot be read."""
        for size in (self.max_cache, self.max_memory):
            if size is not None:
                parse_size(size)

    def cache_bytes(self, usual: str = "4GiB") -> int:
        """Return ``max_cache`` in bytes, or what is usual where none was given."""
        return parse_size(usual if self.max_cache is None else self.max_cache)

    def replace(self, **changes: Any) -> Runtime:
        """Return the same runtime with some fields changed."""
        return replace(self, **changes)

    def report(self, step: str, done: int | None = None, total: int | None = None, *, note: str = "") -> None:
        """Pass an event on to whoever watches or listens, and log its note."""
        if note:
            logger.info(note)
        event = Event(step, done, total, note)
        if self.progress:
            self._bar(event)
        if self.on_event is not None:
            self.on_event(event)

    def counter(self, step: str) -> Callable[[int, int], None]:
        """Return what reports how much of a step is done, called with that and the total."""
        pace = Pace(step)

        def count(done: int, total: int) -> None:
            pace.log(done, total)
            self.report(step, done, total)

        return count

    @contextmanager
    def step(self, name: str, seconds: dict[str, float] | None = None) -> Iterator[None]:
        """Report that a step begins, and add the time it takes to ``seconds`` under its name."""
        progress_log.info("%s ...", name)
        self.report(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self._bar.clear()
        passed = time.perf_counter() - start
        progress_log.debug("%s took %.1f s", name, passed)
        if seconds is not None:
            seconds[name] = seconds.get(name, 0.0) + passed
