"""How a command talks: results on stdout, everything else on stderr, errors in one line."""

from __future__ import annotations

import json
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import typer
from pydantic import Field, PrivateAttr

from tenfold.cli import NOBODY_READS
from tenfold.cli.notes import Notes
from tenfold.diagnosis import trouble
from tenfold.errors import TenfoldError
from tenfold.records import Record

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tenfold.progress import Event

# What click raises for wrong usage; some versions of typer bring a click of their own.
UsageProblem: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
Misuse: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "UsageError")


class Options(Record):
    """Options that several commands share: a record, the attributes of which are documented for the help."""


class Terminal(Options):
    """Output.

    Attributes:
        json: print one JSON object on stdout and nothing else.
        quiet: no progress and no notes on stderr, errors alone.
        verbose: every step of the work on stderr, with the time of day.
        debug: show the traceback of an error.
    """

    as_json: bool = Field(default=False, alias="json")  # a model has a method of that name
    quiet: bool = False
    verbose: bool = False
    debug: bool = False
    command: str = Field(default="", exclude=True)  # the whole command line, and no option
    _notes: Notes = PrivateAttr()
    _held: ExitStack = PrivateAttr(default_factory=ExitStack)

    def model_post_init(self, context: Any) -> None:
        """Decide who is spoken to."""
        del context
        if self.quiet and self.verbose:
            msg = "give --verbose or --quiet, not both."
            raise Misuse(msg)
        self._notes = Notes(quiet=self.quiet, verbose=self.verbose)

    def show(self, *tables: RenderableType) -> None:
        """Print tables on stdout for people; nothing with --json."""
        if self.as_json:
            return
        self._notes.clear()
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
        if not self.as_json:
            self._notes.clear()
            sys.stdout.write(f"{text}\n")

    def result(self, value: Any) -> None:
        """Print the one JSON object; nothing without --json."""
        if self.as_json:
            self._notes.clear()
            ascii_only = "utf" not in (sys.stdout.encoding or "utf-8").lower()
            sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=ascii_only) + "\n")

    def step(self, name: str) -> None:
        """Say on stderr which step begins."""
        self._notes.step(name)

    def on_event(self, event: Event) -> None:
        """Show on stderr how work goes: the name of a step, and a bar where it can be counted."""
        self._notes.on_event(event)

    def hold(self, context: AbstractContextManager[Any]) -> None:
        """Enter a context until the session ends, such as a lock."""
        self._held.enter_context(context)

    @contextmanager
    def session(self) -> Iterator[None]:
        """Route log lines and warnings to stderr, and turn every error into one line and an exit code."""
        with self._notes.session():
            try:
                yield
            except KeyboardInterrupt as stop:
                self._fail(str(stop) or "interrupted", 130)
            except (typer.Exit, UsageProblem):
                raise
            except BrokenPipeError as stop:
                raise typer.Exit(NOBODY_READS) from stop
            except (TenfoldError, OSError) as error:
                self._fail(_one_line(error), 1)
            except Exception as error:  # noqa: BLE001 - whatever a model, a task or torch throws: one line, --debug for more
                self._fail(trouble(error) or f"{type(error).__name__}: {_one_line(error)} (--debug shows where)", 1)
            finally:
                self._held.close()

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
