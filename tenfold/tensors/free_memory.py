"""Memory that freed tensors have left, given back to the system."""

from __future__ import annotations

import ctypes
import sys


def give_back() -> None:
    """Let the C library give back what it keeps of freed memory; nothing where it does not know how.

    glibc keeps blocks of less than 32 MiB in a heap full of holes: after many batches that is as much again as what is
    in use. Call it between steps, not within: it takes milliseconds.

    Example:
        >>> give_back()
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
