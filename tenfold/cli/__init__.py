"""The command line: one file per command in ``commands``, none of which imports torch before it runs."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

NOBODY_READS = 141  # what a shell reports of a program that SIGPIPE ended


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 for an error, 2 for wrong usage, 130 for an interrupt.

    It is 141, without a word, where the reader of its output is gone, as that of ``tenfold list | head``.

    Args:
        args: the arguments; those of the process by default.
    """
    from tenfold.cli.app import run

    return run(list(sys.argv[1:] if args is None else args))


def command() -> NoReturn:
    """Run the command line of this process and end it with the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that has no × shows another sign, and no error at the end
            stream.reconfigure(errors="replace")
    code = main()
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # what is left goes nowhere: the interpreter would try again, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = NOBODY_READS
    from tenfold.cli.launch import leave

    leave(code)
