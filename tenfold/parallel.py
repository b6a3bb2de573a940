"""Parallel map over independent work, in processes of this machine or on a Ray cluster: ordered and deterministic."""

from __future__ import annotations

import os
import re
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.machinery import PathFinder
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar

from tenfold.errors import TenfoldError, WorkerError, first_line, require
from tenfold.files import SCRATCH, remove_leftovers, scratch

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")
_NO_MEMORY = re.compile(r"allocate memory|not enough memory|out of memory|bad_alloc", re.IGNORECASE)


@dataclass(frozen=True)
class Workers:
    """Workers for independent pieces of work.

    Use them in a ``Runtime`` for networks of many or large layers.

    Each piece is a function of a shared value and of an item of its own. Results come in the order of the items and do
    not depend on the number of workers. They equal those of this process to the last bit if it computes with as many
    ``threads`` as a worker does (``torch.set_num_threads``); another number of threads sums in another order.

    A worker that dies ends the work with an error; when this process dies, its workers end within seconds, and what
    they shared is removed.

    Functions and data are sent by cloudpickle between this process and the workers that it has started. Workers know
    entries that a script registers, such as a format, only if they are installed as a plugin.

    Attributes:
        jobs: pieces in progress at a time. 1: one after the other in this process, unless the backend is Ray.
        backend: "loky", processes of this machine by joblib; or "ray": the Ray instance that this process is connected
            to, else the one that is running (or that RAY_ADDRESS names), else a new one of this machine.
        threads: of torch in each worker.

    Example:
        >>> list(Workers().map(pow, 2, [1, 2, 3]))
        [2, 4, 8]
    """

    jobs: int = 1
    backend: Literal["loky", "ray"] = "loky"
    threads: int = 1

    def __post_init__(self) -> None:
        if self.jobs < 1 or self.threads < 1:
            msg = f"jobs={self.jobs} and threads={self.threads} must be at least 1"
            raise TenfoldError(msg)
        if self.backend not in ("loky", "ray"):
            msg = f"unknown backend {self.backend!r}. Known: loky, ray."
            raise TenfoldError(msg)

    @property
    def is_local(self) -> bool:
        """Whether all work runs in this process."""
        return self.backend == "loky" and self.jobs == 1

    def map(self, function: Callable[[S, T], R], shared: S, items: Iterable[T]) -> Iterator[R]:
        """Iterate over ``function(shared, item)`` in the order of the items, as they become ready.

        Args:
            function: of the shared value and an item; depends on nothing else, and changes neither.
            shared: sent once to each worker.
            items: one for each piece of work.

        Raises:
            MissingExtraError: joblib or Ray is not installed.
            WorkerError: a worker died, or has no memory left.
            TenfoldError: as the function raises it.
        """
        if self.is_local:
            return (function(shared, item) for item in items)
        return self._ray(function, shared, items) if self.backend == "ray" else self._loky(function, shared, items)

    @staticmethod
    def send_along(module: ModuleType) -> None:
        """Send the contents of a module along with their uses, so that workers need not import it.

        For modules that were loaded from a file, which workers could not find by name.
        """
        top = module.__name__.partition(".")[0]
        if PathFinder.find_spec(top) is None or module.__name__ == "__main__":
            _pickler().register_pickle_by_value(module)

    def _loky(self, function: Callable[[S, T], R], shared: S, items: Iterable[T]) -> Iterator[R]:
        joblib: Any = require("joblib", "scale")
        with scratch() as folder:
            file = folder / "shared"
            file.write_bytes(packed((function, shared)))
            calls = (joblib.delayed(_from_file)(str(file), packed(item), self.threads) for item in items)
            watched: dict[str, Any] = {"initializer": _end_with, "initargs": (os.getpid(),)}
            parallel = joblib.Parallel(self.jobs, backend="loky", return_as="generator", batch_size=1, **watched)
            try:
                yield from map(opened, parallel(calls))
            except BrokenExecutor as error:
                raise WorkerError(_DIED) from error

    # joblib has a Ray backend, but one without generators (supports_return_generator is False): results could only be
    # returned all at once.
    def _ray(self, function: Callable[[S, T], R], shared: S, items: Iterable[T]) -> Iterator[R]:
        ray: Any = require("ray", "ray")
        connect_to_ray(self.jobs * self.threads)
        work = ray.remote(num_cpus=self.threads)(_from_store)
        common = [ray.put(packed((function, shared)))]  # in a list, Ray hands out the reference instead of the value
        calls = (work.remote(common, packed(item), self.threads) for item in items)
        waiting = deque(islice(calls, self.jobs))
        while waiting:
            try:
                found = ray.get(waiting.popleft())
            except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
                raise WorkerError(_DIED) from error
            waiting.extend(islice(calls, 1))
            yield opened(found)


def connect_to_ray(cpus: int) -> None:
    """Connect to a Ray instance unless this process is connected: to a running one, else to a new one of this machine.

    Raises:
        MissingExtraError: Ray is not installed.
    """
    ray: Any = require("ray", "ray")
    if ray.is_initialized():
        return
    quiet = {"log_to_driver": False, "logging_level": "warning"}
    try:
        ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), **quiet)
    except ConnectionError:
        if "RAY_ADDRESS" in os.environ:
            raise
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)


_DIED = (
    "a worker died: somebody killed it, or the system did when memory ran out. Nothing of its work is used: try again "
    "with fewer jobs, which need less memory."
)


def _end_with(parent: int) -> None:
    """Let this worker end soon after the process that it works for, however that ends, and remove what that left."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        remove_leftovers(Path(tempfile.gettempdir()), SCRATCH)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _from_file(file: str, item: bytes, threads: int) -> bytes:
    return _done(lambda: _read(file), item, threads)


def _from_store(common: list[Any], item: bytes, threads: int) -> bytes:
    return _done(lambda: _fetch(common[0]), item, threads)


@lru_cache(maxsize=1)  # a worker serves many items: what they share is read once
def _read(file: str) -> Any:
    return unpacked(Path(file).read_bytes())


@lru_cache(maxsize=1)
def _fetch(reference: Any) -> Any:
    ray: Any = require("ray", "ray")
    return unpacked(ray.get(reference))


def _done(common: Callable[[], tuple[Callable[[Any, Any], Any], Any]], item: bytes, threads: int) -> bytes:
    """Return the pickled result of a piece of work, or the pickled error."""
    import torch

    torch.set_num_threads(threads)

    def work() -> Any:
        function, shared = common()
        return function(shared, unpacked(item))

    return outcome_of(work)


def outcome_of(work: Callable[[], Any]) -> bytes:
    """Return what work returns, or the error that it raises and users are to see, for ``opened`` elsewhere."""
    try:
        return packed((True, work()))
    except TenfoldError as error:
        return packed((False, error))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not _NO_MEMORY.search(str(error)):
            raise
        msg = f"a worker has no memory left ({first_line(error)}): try again with fewer jobs"
        return packed((False, WorkerError(msg)))


def opened(content: bytes) -> Any:
    """Return what ``outcome_of`` holds, or raise it."""
    well, value = unpacked(content)
    if not well:
        raise value
    return value


def packed(value: Any) -> bytes:
    """Return a value as bytes for another process of this run."""
    return _pickler().dumps(value)  # type: ignore[no-any-return]


def unpacked(content: bytes) -> Any:
    """Return the value that another process of this run has packed."""
    return _pickler().loads(content)


def _pickler() -> Any:
    """Return the cloudpickle of joblib or Ray: what one writes the other reads."""
    try:
        return import_module("joblib.externals.cloudpickle")
    except ImportError:
        return require("ray.cloudpickle", "ray")
