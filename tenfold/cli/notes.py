"""What a command says beside its result, on stderr: log lines, warnings, a bar on terminals, else signs of life."""

from __future__ import annotations

import logging
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from tenfold.progress import Event, ProgressBar, in_words, logger

SILENCE = 60.0  # seconds without a line after which one is due, where nobody sees a bar


class Notes:
    """The lines and the bar of one command.

    On a terminal a bar shows how far work is, and lines of progress are left out: ``verbose`` shows them too, with the
    time of day. Elsewhere each step is a line, and so is every minute without one. ``quiet`` leaves errors alone.
    """

    def __init__(self, *, quiet: bool = False, verbose: bool = False, silence: float = SILENCE) -> None:
        self._quiet, self._verbose, self._silence = quiet, verbose, silence
        self._bar = ProgressBar()
        self._watched = self._bar.is_watched
        self._written = time.monotonic()
        self._ended = threading.Event()

    def step(self, name: str) -> None:
        """Say that a step begins which no ``Runtime`` reports."""
        logger.info("%s ...", name)
        self.on_event(Event(name))

    def on_event(self, event: Event) -> None:
        """Show how work goes."""
        if not self._quiet:
            self._bar(event)

    def clear(self) -> None:
        """Take the bar away."""
        self._bar.clear()

    def write(self, text: str) -> None:
        """Write a line."""
        self.clear()
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
        self._written = time.monotonic()

    @contextmanager
    def session(self) -> Iterator[None]:
        """Show what the library logs and warns of, each warning once and in one line."""
        log = logging.getLogger("tenfold")
        handler, level = _Lines(self, timed=self._verbose), log.level
        if self._watched and not self._verbose:
            handler.addFilter(lambda record: record.name != logger.name)  # the bar says it
        seen: set[str] = set()

        def show(message: Warning | str, *_: object, **__: object) -> None:
            text = " ".join(str(message).split())
            if text not in seen and not self._quiet:
                seen.add(text)
                self.write(f"tenfold: warning: {text}")

        log.addHandler(handler)
        log.setLevel(logging.ERROR if self._quiet else logging.DEBUG if self._verbose else logging.INFO)
        try:
            with warnings.catch_warnings(), self._alive():
                warnings.showwarning = show
                yield
        finally:
            self.clear()
            log.removeHandler(handler)
            log.setLevel(level)

    @contextmanager
    def _alive(self) -> Iterator[None]:
        """Write a line after every minute of silence, where nobody sees a bar."""
        if self._quiet or self._watched:
            yield
            return
        # A thread, as silence is what happens while the work reports nothing. It touches nothing but stderr.
        thread = threading.Thread(target=self._break_silence, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()

    def _break_silence(self) -> None:
        while not self._ended.wait(max(self._written + self._silence - time.monotonic(), 0.01)):
            if time.monotonic() - self._written >= self._silence:
                self.write(f"tenfold: still at work: {self._where()}")

    def _where(self) -> str:
        last, pace = self._bar.last, self._bar.pace
        passed = in_words(time.monotonic() - pace.start)
        if last.done is not None and last.total is not None:
            return f"{pace.line(last.done, last.total)}, {passed} so far"
        return f"{last.step or 'it begins'}, {passed} so far"


class _Lines(logging.Handler):
    def __init__(self, notes: Notes, *, timed: bool) -> None:
        super().__init__()
        self._notes = notes
        self.setFormatter(logging.Formatter(f"tenfold:{' %(asctime)s' * timed} %(message)s", "%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        self._notes.write(self.format(record))
