"""How work goes: events, lines for a log at a bearable pace, and a bar for whoever watches."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TextIO

logger = logging.getLogger("tenfold.progress")

EVERY = 30.0  # seconds between two lines about one step
REDRAW = 0.1  # seconds between two looks of the bar
BAR = 24  # characters

Clock = Callable[[], float]


@dataclass(frozen=True)
class Event:
    """Progress: the step that is under way, how much of it is done where that can be counted, and what is to be known.

    Use it with ``Runtime(on_event=...)`` to show progress in a program of your own.

    A ``note`` is a sentence that is logged as well, such as what memory a step will take.
    """

    step: str
    done: int | None = None
    total: int | None = None
    note: str = ""


@dataclass
class Pace:
    """How far a step is that can be counted, in words, and how long it will go on if it goes on as it did.

    Example:
        >>> now = iter([0.0, 40.0])
        >>> Pace("fit layers", lambda: next(now)).line(4, 20)
        'fit layers: 4 of 20, about 3 min left'
    """

    step: str
    clock: Clock = time.monotonic
    first: int = 0  # what was done at the start
    start: float = field(init=False)
    said: float = field(init=False)

    def __post_init__(self) -> None:
        self.start = self.said = self.clock()

    def line(self, done: int, total: int) -> str:
        """Return the line about what is done now."""
        passed = self.clock() - self.start
        left = ""
        if self.first < done < total and passed > 1:
            left = f", about {in_words(passed / (done - self.first) * (total - done))} left"
        return f"{self.step}: {done} of {total}{left}"

    def log(self, done: int, total: int) -> None:
        """Log the line: at INFO if the last one is long ago, else at DEBUG."""
        due = self.clock() - self.said >= EVERY
        if due:
            self.said = self.clock()
        logger.log(logging.INFO if due else logging.DEBUG, "%s", self.line(done, total))


def counter(step: str) -> Callable[[int, int], None]:
    """Return what logs how much of a step is done, called with that and the total: for verbs without a ``Runtime``."""
    return Pace(step).log


def in_words(seconds: float) -> str:
    """Return a duration for people who wait.

    Example:
        >>> in_words(7.4), in_words(200), in_words(8000)
        ('7 s', '3 min', '2 h 13 min')
    """
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class ProgressBar:
    """The step under way in one line on standard error, drawn in place: on terminals and in notebooks, else nowhere.

    It is drawn by the events alone, at most ten times a second: no thread runs beside the work, nothing is to be
    cleaned up after an error, and no package is needed, in notebooks neither.

    Args:
        stream: where to draw; standard error by default.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self.pace, self.last = Pace(""), Event("")
        self._drawn, self._shown = 0.0, 0

    def __call__(self, event: Event) -> None:
        """Show an event; ``last`` and ``pace`` are those of the last one, also where nobody watches."""
        if event.note:
            return
        if event.step != self.last.step or (event.total is None) != (self.last.total is None):
            self.pace, self._drawn = Pace(event.step, first=event.done or 0), 0.0  # counting begins with a step's first
        self.last = event
        if not self.is_watched:
            return
        if event.total is None or event.done is None:
            self._draw(f"{event.step} ...")
        elif event.done >= event.total:
            self.clear()
        elif time.monotonic() - self._drawn >= REDRAW:
            full = round(BAR * event.done / event.total)
            self._draw(f"[{'=' * full}{' ' * (BAR - full)}] {self.pace.line(event.done, event.total)}")
            self._drawn = time.monotonic()

    @property
    def is_watched(self) -> bool:
        """Whether somebody sees it: a terminal, or the cell of a notebook."""
        stream = self._stream or sys.stderr
        return stream.isatty() or type(stream).__module__.startswith("ipykernel")

    def clear(self) -> None:
        """Take the line away, before something else is written or when a step is done."""
        if self._shown:
            self._write(f"\r{' ' * self._shown}\r")
            self._shown = 0

    def _draw(self, text: str) -> None:
        text = text[: shutil.get_terminal_size().columns - 1]
        self._write(f"\r{text.ljust(self._shown)}")
        self._shown = len(text)

    def _write(self, text: str) -> None:
        stream = self._stream or sys.stderr
        stream.write(text)
        stream.flush()
