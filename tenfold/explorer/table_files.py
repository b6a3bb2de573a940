"""Find the option table of a run on disk: in its folder, or beside the file of a plan."""

from __future__ import annotations

import shlex
from contextlib import suppress
from itertools import count
from pathlib import Path

from tenfold.errors import DataError
from tenfold.records import OptionTable
from tenfold.reporting.run_files import read_run

OPTIONS = "options.json"


def options_file(path: str | Path) -> Path:
    """Return the file of the option table: in the folder of a run, or beside a plan.

    Example:
        >>> [options_file(name).as_posix() for name in ("half/plan.yaml", "plans/half.yaml")]
        ['half/options.json', 'plans/half.options.json']
    """
    path = Path(path)
    if path.is_dir():
        return path / OPTIONS
    if path.name in {"plan.yaml", "record.json"}:
        return path.with_name(OPTIONS)
    return path if path.name.endswith(OPTIONS) else path.with_name(f"{path.stem}.{OPTIONS}")


def read_options(path: str | Path) -> OptionTable:
    """Return the option table that the plan of a run was chosen from.

    Args:
        path: the folder of a run, the file of a plan, or that of the table.

    Raises:
        DataError: there is none, or it cannot be read; the message says how to make it.
    """
    path = Path(path)
    file = options_file(path)
    if not path.exists():
        msg = f"there is nothing at {path}: give the folder of a run, or a plan that tenfold plan wrote"
        raise DataError(msg)
    if not file.is_file():
        msg = (
            f"{path} has no {file.name}, the options of its plan. Plans by the rule global leave one: make "
            "it with tenfold plan ... --budget macs=0.5 --out plan.yaml, then explore plan.yaml"
        )
        raise DataError(msg)
    return OptionTable.load(file)


def free_name(path: Path) -> Path:
    """Return the path, numbered if the file exists."""
    names = (path if i == 1 else path.with_stem(f"{path.stem}-{i}") for i in count(1))
    return next(name for name in names if not name.exists())


def run_name(path: str | Path, table: OptionTable, out: Path) -> tuple[str, str]:
    """Return the name of a run, and the command that carries out a plan saved at ``out``."""
    task, file = None, options_file(path)
    if file.name == OPTIONS:
        with suppress(DataError):
            task = read_run(file.parent).record.task
    words = ["tenfold", "compress", *(("--task", task) if task else ()), "--plan", str(out)]
    return task or table.model, f"{shlex.join(words)} ..."
