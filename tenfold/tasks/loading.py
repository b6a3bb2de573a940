"""Load a task by its text: a registered name, or a class of the user's own."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from tenfold.errors import TenfoldError, UnknownNameError
from tenfold.registry import did_you_mean
from tenfold.tasks.base import TASKS, Task

_FILE = re.compile(r"^(?P<file>.+\.py)(?::(?P<name>[^:]*))?(?::(?P<variant>.*))?$")
FORMS = "Write NAME[:VARIANT], pkg.module:Class[:VARIANT] or file.py:Class[:VARIANT]."


def load_task(text: str, *, data: Path | str | None = None, seed: int = 0) -> Task:
    """Return the task that ``text`` names.

    ``"cifar10"`` and ``"cifar10:resnet56"`` are registered names, with the default or another variant. Your own task is
    a class in a module (``"pkg.module:MyTask"``) or a file (``"folder/my_task.py:MyTask"``), with a variant after
    another colon. The module is imported; it may import other files beside it.

    Args:
        text: the task.
        data: see ``Task``.
        seed: see ``Task``.

    Raises:
        UnknownNameError: no such task, module, file, class or variant; the message suggests similar names.
        TenfoldError: the module cannot be imported, or the class is not a complete task.

    Example:
        >>> load_task("cifar10:resnet20").id
        'cifar10:resnet20'
    """
    in_file = _FILE.match(text)
    if in_file:
        cls = _class_in(_import_file(Path(in_file["file"])), in_file["name"] or "", in_file["file"])
        return cls(in_file["variant"] or None, data=data, seed=seed)
    name, _, rest = text.partition(":")
    if name in TASKS.names():
        return TASKS.get(name)(rest if ":" in text else None, data=data, seed=seed)
    missing = ""
    if rest and all(part.isidentifier() for part in name.split(".")):
        module = _import_module(name)
        if module is not None:
            cls_name, _, variant = rest.partition(":")
            return _class_in(module, cls_name, name)(variant or None, data=data, seed=seed)
        missing = f"There is no module {name!r} either. "
    msg = f"unknown task {name!r}. {missing}{did_you_mean(name, TASKS.names())} {FORMS}"
    raise UnknownNameError(msg)


def _class_in(module: ModuleType, name: str, where: str) -> type[Task]:
    own = [k for k, v in vars(module).items() if _is_task(v) and v.__module__ == module.__name__]
    found = getattr(module, name, None) if name else None
    if found is None:
        msg = f"{where} has no task {name!r}. {did_you_mean(name, own)} {FORMS}"
        raise UnknownNameError(msg)
    if not _is_task(found):
        msg = f"{name} in {where} is not a task: it must be a class derived from tenfold.tasks.Task"
        raise TenfoldError(msg)
    cls: type[Task] = found
    lacking = sorted(cls.__abstractmethods__) + [a for a in ("name",) if not hasattr(cls, a)]
    if lacking:
        msg = f"{name} in {where} is not a whole task: it lacks {', '.join(lacking)}"
        raise TenfoldError(msg)
    return cls


def _is_task(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, Task)


def _import_module(name: str) -> ModuleType | None:
    """Import a module, from the working folder too; None if it does not exist."""
    with _importing_from(Path.cwd(), name):
        try:
            if importlib.util.find_spec(name) is None:
                return None
        except ModuleNotFoundError:  # a parent package that does not exist
            return None
        return importlib.import_module(name)


def _import_file(path: Path) -> ModuleType:
    """Import the module of a file, once per process."""
    path = path.expanduser().resolve()
    if not path.is_file():
        near = did_you_mean(path.name, (p.name for p in path.parent.glob("*.py"))) if path.parent.is_dir() else ""
        msg = f"there is no task file {path}. {near}".rstrip()
        raise UnknownNameError(msg)
    name = f"{path.stem}_{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        msg = f"{path} cannot be imported as a Python file"
        raise TenfoldError(msg)
    module = importlib.util.module_from_spec(spec)
    with _importing_from(path.parent, str(path)):
        sys.modules[name] = module  # dataclasses look their module up there
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return module


@contextmanager
def _importing_from(folder: Path, what: str) -> Iterator[None]:
    """Search ``folder`` for imports, as Python does for a script, and report failures in one line."""
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    except TenfoldError:
        raise
    except Exception as error:
        msg = f"{what} failed while being imported: {type(error).__name__}: {error}"
        raise TenfoldError(msg) from error
    finally:
        sys.path.remove(entry)
