"""Training progress callbacks; a rich progress bar."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tenfold.progress import Event
from tenfold.records.tuning import EpochRecord

if TYPE_CHECKING:
    from rich.console import Console

OnEpoch = Callable[[EpochRecord], None]


class TuneProgress:
    """Callbacks of a fine-tuning run, in the main process. Override the ones you need.

    Args:
        on_epoch: called with the record of each epoch once it is complete and stored.
    """

    def __init__(self, on_epoch: OnEpoch | None = None) -> None:
        self._on_epoch = on_epoch

    def start(self, *, epochs: int, steps: int, done: int) -> None:
        """Begin: ``epochs`` of ``steps`` each, of which ``done`` epochs were restored from the folder."""

    def advance(self, loss: Tensor) -> None:
        """Count one step. Reading ``loss`` waits for the device: do it seldom."""

    def end_epoch(self, record: EpochRecord) -> None:
        """Handle an epoch that is complete and stored."""
        if self._on_epoch is not None:
            self._on_epoch(record)

    def stop(self) -> None:
        """End, after success or an error."""


class TuneEvents(TuneProgress):
    """Training as events of one step, like those of all other work: for ``Runtime.on_event`` or a ``ProgressBar``.

    Args:
        on_event: called after each optimizer step.
        step: the name of the work.

    Example:
        >>> seen = []
        >>> steps = TuneEvents(seen.append)
        >>> steps.start(epochs=2, steps=10, done=1)
        >>> steps.advance(Tensor())
        >>> seen[-1].done, seen[-1].total
        (11, 20)
    """

    def __init__(self, on_event: Callable[[Event], None], step: str = "tune") -> None:
        super().__init__()
        self._on_event, self._step = on_event, step
        self._done = self._total = 0

    def start(self, *, epochs: int, steps: int, done: int) -> None:
        """Count from what was restored."""
        self._done, self._total = done * steps, epochs * steps

    def advance(self, loss: Tensor) -> None:
        """Count one step."""
        del loss
        self._done += 1
        self._on_event(Event(self._step, self._done, self._total))


class RichProgress(TuneProgress):
    """A bar over all epochs with loss, score and remaining time, on standard error; silent without a terminal.

    Args:
        console: where to draw; standard error by default.
        on_epoch: see ``TuneProgress``.
    """

    def __init__(self, console: Console | None = None, on_epoch: OnEpoch | None = None) -> None:
        super().__init__(on_epoch)
        self._console = console
        self._bar: Any = None
        self._text = ""
        self._pending = 0
        self._drawn = 0.0

    def start(self, *, epochs: int, steps: int, done: int) -> None:
        """Draw the bar, if there is a terminal."""
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        console = self._console or Console(stderr=True)
        if not console.is_terminal:
            return
        columns = (
            TextColumn("tune {task.fields[epoch]}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._epochs, self._done = epochs, done
        self._bar = Progress(*columns, console=console, speed_estimate_period=600)
        self._task = self._bar.add_task("", total=epochs * steps, completed=done * steps, epoch=self._place(), text="")
        self._bar.start()

    def advance(self, loss: Tensor) -> None:
        """Move the bar, at most ten times a second."""
        if self._bar is None:
            return
        self._pending += 1
        now = time.monotonic()
        if now - self._drawn >= 0.1:
            self._flush(f"loss {loss.item():.3f} {self._text}")
            self._drawn = now

    def end_epoch(self, record: EpochRecord) -> None:
        """Show the score of the epoch from now on."""
        if self._bar is not None:
            self._done = record.epoch
            self._text = "" if record.score is None else f"score {record.score:.4f}"
            self._flush(f"loss {record.loss:.3f} {self._text}")
        super().end_epoch(record)

    def stop(self) -> None:
        """Leave the bar as it is and release the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _flush(self, text: str) -> None:
        self._bar.update(self._task, advance=self._pending, epoch=self._place(), text=text.strip())
        self._pending = 0

    def _place(self) -> str:
        return f"{min(self._done + 1, self._epochs)}/{self._epochs}"
