"""The way of a budget, watched: in which files its values are held between the command line and the knapsack.

A file counts if a function in it, run by ``tenfold compress --budget`` until the first knapsack is solved, has the
budget among its arguments, variables or results - the option's words, a ``Budget``, a mapping of quantities to limits -
or calls anything so. A recipe that is only passed on does not count: nobody looks into it.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import CodeType, FrameType
from typing import Any

from benchmarks.house.source import PACKAGE, ROOT

BUDGET = "macs=0.437"
QUANTITIES = {"params", "macs", "latency", "max_params", "max_macs", "max_latency_ms"}
NAMES = {"budget", "budgets", "limits", "capacity", "capacities", "allowance"}


COMMAND = ("compress", "--task", "digits", "--budget", BUDGET, "--no-tune", "--no-latency", "--out")


def budget_files() -> list[str]:
    """Return the files on the way, in the order in which they first held the budget.

    Raises:
        RuntimeError: the watched run ended before a knapsack was solved.
    """
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.house.budget_path", folder]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        found = Path(folder) / "files"
        if not found.is_file():
            msg = (
                f"no knapsack was solved by tenfold {' '.join(COMMAND)}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            )
            raise RuntimeError(msg)
        return found.read_text(encoding="utf-8").split()


class Watch:
    """A profiler that notes the files of functions that hold the budget, and ends the process at the knapsack's answer.

    Args:
        out: where the names of the files are written then.
    """

    def __init__(self, out: Path) -> None:
        self.files: dict[str, None] = {}
        self.out = out

    def __call__(self, frame: FrameType, event: str, result: Any) -> None:
        """Look at a function that begins or ends."""
        if event not in {"call", "return"} or not _is_ours(frame):
            return
        self._look(frame, result if event == "return" else None)
        solved = event == "return" and _stem(frame) == "knapsack"
        if solved and (frame.f_back is None or _stem(frame.f_back) != "knapsack"):
            sys.setprofile(None)
            above: FrameType | None = frame
            while above is not None:
                if _is_ours(above):
                    self._look(above, None)
                above = above.f_back
            self.out.write_text("\n".join(self.files), encoding="utf-8")
            os._exit(0)  # what follows is not on the way

    def _look(self, frame: FrameType, result: Any) -> None:
        values = {**frame.f_locals, "result of it": result}
        if _words(frame.f_code) & NAMES or any(map(is_budget, values.values())):
            self.files[Path(frame.f_code.co_filename).relative_to(PACKAGE).as_posix()] = None


def _is_ours(frame: FrameType) -> bool:
    function = frame.f_code.co_flags & inspect.CO_OPTIMIZED  # no module, and no body of a class
    return bool(function) and frame.f_code.co_filename.startswith(f"{PACKAGE}{os.sep}")


def _stem(frame: FrameType) -> str:
    return Path(frame.f_code.co_filename).stem


def _words(code: CodeType) -> set[str]:
    """Return the names, attributes and keywords that a function uses."""
    keywords = {word for c in code.co_consts if isinstance(c, tuple) for word in c if isinstance(word, str)}
    return {*code.co_names, *code.co_varnames, *keywords, *(c for c in code.co_consts if isinstance(c, str))}


def is_budget(value: Any) -> bool:
    """Whether a value is the budget, in any of its shapes."""
    if type(value).__name__ == "Budget":
        return True
    if isinstance(value, str):
        return value == BUDGET
    if isinstance(value, list | tuple):
        return len(value) == 1 and isinstance(value[0], str) and value[0] == BUDGET
    return isinstance(value, dict) and bool(value) and value.keys() <= QUANTITIES and all(map(_is_real, value.values()))


def _is_real(value: Any) -> bool:
    return value is None or isinstance(value, int | float)


def main() -> None:
    """Run the command line under watch."""
    folder = Path(sys.argv[1])
    from tenfold.cli import main as tenfold

    sys.setprofile(Watch(folder / "files"))
    tenfold([*COMMAND, str(folder / "small")])


if __name__ == "__main__":
    main()
