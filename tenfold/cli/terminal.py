"""How a command talks: results on stdout, everything else on stderr, errors in one line."""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tenfold.errors import TenfoldError

if TYPE_CHECKING:
    from rich.console import RenderableType

_PANEL = "Output"

# What click raises for wrong usage; some versions of typer bring a click of their own.
UsageProblem: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
Misuse: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "UsageError")


@dataclass(frozen=True)
class Terminal:
    """What to show, and how."""

    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.", rich_help_panel=_PANEL)
    ] = False
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress and no notes on stderr.", rich_help_panel=_PANEL)
    ] = False
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=_PANEL)] = (
        False
    )

    def show(self, *tables: RenderableType) -> None:
        """Print tables on stdout for people; nothing with --json."""
        if self.json:
            return
        if not sys.stdout.isatty():
            from tenfold.reporting import as_text

            self.say(as_text(*tables) + "\n")
            return
        from rich.console import Console

        console = Console(highlight=False)
        for table in tables:
            console.print(table, "", markup=False)

    def say(self, text: str) -> None:
        """Print a line of text on stdout, as it is; nothing with --json."""
        if not self.json:
            sys.stdout.write(f"{text}\n")

    def result(self, value: Any) -> None:
        """Print the one JSON object; nothing without --json."""
        if self.json:
            sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def step(self, name: str) -> None:
        """Tell on stderr which step begins, if somebody watches."""
        if not self.quiet and sys.stderr.isatty():
            sys.stderr.write(f"{name} ...\n")

    @contextmanager
    def session(self) -> Iterator[None]:
        """Route log lines and warnings to stderr, and turn every error into one line and an exit code."""
        with _notes(quiet=self.quiet):
            try:
                yield
            except KeyboardInterrupt as stop:
                self._fail(str(stop) or "interrupted", 130)
            except (typer.Exit, UsageProblem):
                raise
            except (TenfoldError, OSError) as error:
                self._fail(_one_line(error), 1)
            except Exception as error:  # noqa: BLE001 - whatever a model, a task or torch throws: one line, --debug for more
                self._fail(f"{type(error).__name__}: {_one_line(error)} (--debug shows where)", 1)

    def _fail(self, message: str, code: int) -> None:
        if self.debug:
            traceback.print_exc()
        complain(message)
        raise typer.Exit(code)


def complain(message: str) -> None:
    """Print an error on stderr, in one line."""
    sys.stderr.write(f"tenfold: error: {' '.join(message.split())}\n")


def end_on_sigterm() -> None:
    """Let SIGTERM unwind the stack, so that half-written files are removed."""

    def leave(number: int, frame: object) -> None:
        del frame
        raise SystemExit(128 + number)

    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, leave)


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None and not isinstance(error, TenfoldError):
        return f"{error.filename}: {error.strerror or error}"
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _notes(*, quiet: bool) -> Iterator[None]:
    """Show what the library logs and warns of on stderr, each warning once and in one line."""
    logger = logging.getLogger("tenfold")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("tenfold: %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.ERROR if quiet else logging.INFO)
    seen: set[str] = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        text = " ".join(str(message).split())
        if text not in seen and not quiet:
            seen.add(text)
            sys.stderr.write(f"tenfold: warning: {text}\n")

    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
