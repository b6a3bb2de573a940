"""Files that appear whole or not at all, and the processes that own them: staging, locks, leftovers, reasons.

What is being written lies in a folder ``.NAME.XXXXXXXX.partial`` beside its target, which its process locks. The lock
ends with the process, however that ends: the next writer of the same name removes what nobody owns.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

from tenfold.errors import FileError

SCRATCH = "tenfold-"  # how temporary folders begin that lie beside no target
_POLL = 0.01  # seconds between two looks at a lock that somebody else holds


@contextmanager
def atomic_write(path: Path, beside: Sequence[str] = ()) -> Iterator[Path]:
    """Yield a path to write to; on success the file is synced to the disk and replaces ``path``.

    The file has the name of ``path`` and does not exist yet; writers may leave other files beside it, which go with the
    folder. Those with a suffix of ``beside`` are kept: they come first, after an older ``path`` was removed, so that
    where there is a ``path``, what is beside it belongs to it.

    Raises:
        FileError: it cannot be written: no right, no space, no such folder.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged(path) as folder:
            partial = folder / path.name
            yield partial
            others = [(partial.with_suffix(suffix), path.with_suffix(suffix)) for suffix in beside]
            if others:
                path.unlink(missing_ok=True)
            for new, old in (*others, (partial, path)):
                new.chmod(0o644)
                replace(new, old)
    except FileError:
        raise
    except OSError as error:
        msg = f"cannot write {path}: {reason(error)}"
        raise FileError(msg) from error


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically, as UTF-8; what is none, as some names of files are not, is escaped."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_text(path: Path, what: str) -> str:
    """Return the text in a file; ``what`` it holds is for the message.

    Raises:
        FileError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        msg = f"{path} is not {what}: it is not UTF-8 text"
        raise FileError(msg) from error
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        msg = f"cannot read {what} {path}: {reason(error)}"
        raise FileError(msg) from error


def check_writable(path: Path) -> None:
    """Raise FileError if the file ``path`` could not be written: to be called before the work that fills it."""
    if path.is_dir():
        msg = f"cannot write {path}: it is a folder"
        raise FileError(msg)
    there = next(p for p in path.absolute().parents if p.exists())
    try:
        with staged(there / path.name):
            pass
    except OSError as error:
        msg = f"cannot write {path}: {reason(error)}"
        raise FileError(msg) from error


def reason(error: BaseException) -> str:
    """Return why the system refused, without the path, of which the message around it speaks.

    Example:
        >>> reason(OSError(28, "No space left on device", "plan.yaml")), reason(ValueError("too long"))
        ('No space left on device', 'too long')
    """
    while isinstance(error, FileError) and error.__cause__ is not None:
        error = error.__cause__
    return getattr(error, "strerror", None) or str(error)


def link(file: Path, new: Path) -> None:
    """Give a file a second name, or make a copy where the file system has no second names."""
    try:
        os.link(file, new)
    except OSError:
        shutil.copyfile(file, new)


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yield a new folder beside ``path``, to be filled and moved there; what is left in it is removed.

    Folders that killed processes left for the same target are removed too.

    Raises:
        OSError: the folder of ``path`` cannot be written to.
    """
    remove_leftovers(path.parent, f".{path.name}.")
    with _owned(path.parent, f".{path.name}.") as folder:
        yield folder


@contextmanager
def scratch() -> Iterator[Path]:
    """Yield a temporary folder, which is removed in the end; those of killed processes are removed at once."""
    parent = Path(tempfile.gettempdir())
    remove_leftovers(parent, SCRATCH)
    with _owned(parent, SCRATCH) as folder:
        yield folder


def remove_leftovers(parent: Path, prefix: str) -> None:
    """Remove the folders ``PREFIX*.partial`` in ``parent`` that no living process owns."""
    ours = re.compile(re.escape(prefix) + r"[a-z0-9_]+\.partial")
    with suppress(OSError):
        for name in os.listdir(parent):  # noqa: PTH208 - a name that is not UTF-8 is one as well
            if ours.fullmatch(name):
                with suppress(OSError), _opened(parent / name) as handle:
                    if _try_lock(handle):
                        shutil.rmtree(parent / name, ignore_errors=True)


def replace(new: Path, path: Path) -> None:
    """Move a file or folder over ``path``, its contents on the disk before its name is: a power cut loses neither."""
    for file in new.iterdir() if new.is_dir() else ():
        _sync(file)
    _sync(new)
    new.replace(path)
    _sync(path.parent)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock on a file that several processes read, extend and replace; the others wait.

    The lock is a file beside it, ``.NAME.lock``, that is there while somebody holds it.

    Example:
        >>> file = Path(tempfile.mkdtemp()) / "count.txt"
        >>> with locked(file):
        ...     write_text(file, str(int(file.read_text() if file.exists() else 0) + 1))
        >>> file.read_text(), [p.name for p in file.parent.iterdir()]
        ('1', ['count.txt'])
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    while (handle := _taken(lock)) is None:
        time.sleep(_POLL)
    yield from _held(lock, handle)


@contextmanager
def in_use(lock: Path, what: Path) -> Iterator[None]:
    """Hold the file ``lock`` while this process works on the folder ``what``, which nobody else may do meanwhile.

    Raises:
        FileError: another process holds it.
        OSError: the lock file cannot be written.
    """
    if (handle := _taken(lock)) is None:
        holder = ""
        with suppress(OSError, ValueError):
            holder = f" by process {int(lock.read_text(encoding='ascii'))}"
        msg = f"{what} is in use{holder}: wait until that ends, or choose another folder."
        raise FileError(msg)
    with suppress(OSError):  # for the message only
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
    yield from _held(lock, handle)


def _taken(lock: Path) -> int | None:
    """Return a descriptor of the lock file that has the lock; None where somebody else has it."""
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _try_lock(handle):
                os.close(handle)
                return None
            if _is_at(handle, lock):
                return handle
        except OSError:  # no locks on this file system
            return handle
        os.close(handle)  # its holder had removed it just before


def _held(lock: Path, handle: int) -> Iterator[None]:
    try:
        yield
    finally:
        with suppress(OSError):
            lock.unlink()
        with suppress(OSError):
            _unlock(handle)  # closing does not, where a fork of this process lives on
        os.close(handle)


@contextmanager
def _owned(parent: Path, prefix: str) -> Iterator[Path]:
    while True:
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=prefix, suffix=".partial"))
        with ExitStack() as stack:
            try:
                handle = stack.enter_context(_opened(folder))
            except FileNotFoundError:  # somebody took it for a leftover before it was opened
                continue
            with suppress(OSError):  # no locks on this file system: nobody removes what is there
                if not (_try_lock(handle) and _is_at(handle, folder)):
                    continue  # or before it was locked
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Yield a descriptor; -1 for a folder where the system opens none."""
    handle = -1 if sys.platform == "win32" and path.is_dir() else os.open(path, os.O_RDONLY)
    try:
        yield handle
    finally:
        if handle >= 0:
            os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _sync(path: Path) -> None:
    with suppress(OSError) if path.is_dir() else nullcontext(), _opened(path) as handle:
        os.fsync(handle)


if sys.platform == "win32":
    import msvcrt

    def _try_lock(handle: int) -> bool:
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        return True

    def _unlock(handle: int) -> None:
        msvcrt.locking(handle, msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _try_lock(handle: int) -> bool:
        """Lock a descriptor, or say that somebody else has; raises OSError where the file system has no locks."""
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _unlock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_UN)
