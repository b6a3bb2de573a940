"""What can go wrong, by name. Every error is a TenfoldError and a builtin error as well."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from tenfold.diagnosis import installed, trouble


class TenfoldError(Exception):
    """Root of every error that tenfold raises on purpose.

    Use it in ``except`` to catch whatever tenfold refuses; its subclasses say what went wrong.
    """


class UnknownNameError(TenfoldError, LookupError):
    """A format, rule, task, layer path or pattern that does not exist."""


class RankError(TenfoldError, ValueError):
    """A rank outside of what the weight allows."""


class WeightError(TenfoldError, ValueError):
    """A weight that cannot be decomposed: non-finite, empty, or of a shape that the format refuses."""


class PlanError(TenfoldError, ValueError):
    """A plan that does not fit the model, or contradicts itself."""


class RecipeError(TenfoldError, ValueError):
    """A recipe with a field or a value that does not exist."""


class BudgetError(TenfoldError, ValueError):
    """A budget that cannot be read or cannot be met."""


class ProfileError(TenfoldError, ValueError):
    """A model whose forward does not run on the example inputs."""


class DataError(TenfoldError, ValueError):
    """Data that is missing, empty or of the wrong shape."""


class CheckpointError(TenfoldError, ValueError):
    """A checkpoint that is missing, damaged, foreign or made for another model."""


class FileError(TenfoldError, OSError):
    """A file that cannot be read or written, or a folder that another process works in."""


class WorkerError(TenfoldError, RuntimeError):
    """A worker process that died, or ran out of memory."""


class ExportError(TenfoldError, RuntimeError):
    """A model that a target cannot run, or a file that does not compute what the model does."""


class TuningError(TenfoldError, RuntimeError):
    """Training that cannot start or go on: nothing to train, or a loss that is not finite."""


class MissingExtraError(TenfoldError, ImportError):
    """An optional dependency that is not installed; the message names the extra."""


class InstallationError(TenfoldError, ImportError):
    """A package that is installed but does not import, or does not fit another; the message says what to install."""


class TenfoldWarning(UserWarning):
    """Root of every warning that tenfold emits."""


class CalibrationWarning(TenfoldWarning):
    """Too little calibration data for what is estimated from it."""


class AgreementWarning(TenfoldWarning):
    """A compressed model that no longer does what the original does."""


# What wraps functions of tenfold or calls it back: a warning that pointed there would say nothing.
_BETWEEN = {"tenfold", "contextlib", "torch"}


def warn(message: str, category: type[TenfoldWarning] = TenfoldWarning) -> None:
    """Warn, with the file and the line outside of tenfold from which it was called, however deep this is.

    Example:
        >>> with warnings.catch_warnings(record=True) as said:
        ...     warn("few samples", CalibrationWarning)
        >>> said[0].category.__name__, "contextlib" in said[0].filename
        ('CalibrationWarning', False)
    """
    level, frame = 1, inspect.currentframe()
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


@contextmanager
def naming_layer(path: str) -> Iterator[None]:
    """Raise what goes wrong meanwhile as a PlanError that names the layer.

    Example:
        >>> with naming_layer("fc"):
        ...     raise RankError("the rank is too large")
        Traceback (most recent call last):
        tenfold.errors.PlanError: layer 'fc': the rank is too large
    """
    try:
        yield
    except TenfoldError as error:
        msg = f"layer {path!r}: {error}"
        raise PlanError(msg) from error


def first_line(error: BaseException) -> str:
    r"""Return the first line of an error message, or the name of its type if there is none.

    Example:
        >>> first_line(ValueError("too large\nsee the manual")), first_line(KeyError())
        ('too large', 'KeyError')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def naming_trouble() -> Iterator[None]:
    """Raise as an InstallationError what goes wrong meanwhile because packages do not fit each other.

    Use it around the first use of a library that imports its parts late.
    """
    try:
        yield
    except TenfoldError:
        raise
    except Exception as error:
        if (found := trouble(error)) is not None:
            raise InstallationError(found) from error
        raise


def require(module: str, extra: str) -> object:
    """Import and return an optional ``module``, or say in one line which extra brings it, or what is wrong with it.

    A package ``MODULE_telemetry`` is not found meanwhile: by that of OpenVINO each import is reported to its makers,
    unasked, and files are left in the home folder. Without it OpenVINO is silent; who has imported it before is not
    overruled.

    Raises:
        MissingExtraError: the module is not installed.
        InstallationError: it is, but lacks a package itself, or does not fit another.
    """
    import importlib
    import sys

    package = module.partition(".")[0]
    reporter = f"{module}_telemetry"
    hidden = module not in sys.modules and reporter not in sys.modules
    if hidden:
        sys.modules[reporter] = None  # type: ignore[assignment] # Python's way to say that there is none
    try:
        return importlib.import_module(module)
    except Exception as error:
        known = trouble(error)
        if known is not None:
            raise InstallationError(known) from error
        pip = f"pip install 'tenfold[{extra}]'"
        lacking = (getattr(error, "name", None) or "").partition(".")[0]
        if isinstance(error, ImportError) and (lacking == package or installed(package) is None):
            msg = f"{module} is not installed. Install it with: {pip}"
            raise MissingExtraError(msg) from error
        missing = isinstance(error, ModuleNotFoundError) and lacking
        why = f"it needs {lacking}, which is missing" if missing else first_line(error)
        msg = f"{package} is installed but does not import: {why}. Install it again: {pip} --upgrade --force-reinstall"
        raise InstallationError(msg) from error
    finally:
        if hidden:
            sys.modules.pop(reporter, None)
