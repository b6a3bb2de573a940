"""A streamed run on a Ray cluster: actors that each hold some of the samples, and start again where one is lost."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from tenfold.errors import WorkerError, require
from tenfold.parallel import connect_to_ray, opened, outcome_of, packed, unpacked
from tenfold.progress import Event
from tenfold.runtime import Runtime
from tenfold.streaming.ranks import PATIENCE, Ranks

logger = logging.getLogger("tenfold")

R = TypeVar("R")
TRIES = 4  # a run that loses actors more often than that has another fault
LOOK = 0.5  # seconds between two looks at how far they are
_KEPT = ("max_cache", "max_memory", "folder")  # of the runtime, in the actors
GRACE = 30.0  # seconds after one fails, for the death of another to be known as the reason


def run_on_ray(work: Callable[[Runtime, Ranks], R], runtime: Runtime) -> R:
    """Return what the main one of several actors returns, which work together as ``Ranks``.

    Where an actor is lost, all start again: what they had written to the folder of the run is not done again.

    Args:
        work: sent to the actors.
        runtime: of which folder, cache and the number of workers count; events are passed on.

    Raises:
        MissingExtraError: Ray is not installed.
        WorkerError: actors were lost again and again.
        TenfoldError: as the work raises it.
    """
    ray: Any = require("ray", "ray")
    workers = runtime.workers
    connect_to_ray(workers.jobs * workers.threads)
    actor = ray.remote(num_cpus=workers.threads, max_concurrency=2, max_restarts=0)(_Actor)
    sent = ray.put(packed(work))
    plain = {name: getattr(runtime, name) for name in _KEPT}
    for _ in range(TRIES):
        actors = [actor.remote(index, workers.jobs, workers.threads) for index in range(workers.jobs)]
        try:
            address = ray.get(actors[0].address.remote())
            runs = [one.run.remote(address, [sent], plain) for one in actors]
            found: R = _followed(ray, actors, runs, runtime)
            return found
        except _LostError:
            logger.warning("an actor of the run was lost: all start again from what is on the disk")
        finally:
            for one in actors:
                ray.kill(one)
    msg = f"actors of the run were lost {TRIES} times: somebody kills them, or the system does when memory runs out"
    raise WorkerError(msg)


class _LostError(Exception):
    """An actor died."""


def _followed(ray: Any, actors: list[Any], runs: list[Any], runtime: Runtime) -> Any:
    """Return the result of the main actor, passing on what it tells on the way."""
    lost = (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError)
    waiting, told, result = list(runs), 0, None
    while waiting:
        ready, waiting = ray.wait(waiting, timeout=LOOK)
        try:
            events = ray.get(actors[0].events.remote(told), timeout=GRACE)
            told += len(events)
            for event in events:
                runtime.report(event.step, event.done, event.total, note=event.note)
            for run in ready:
                own = opened(ray.get(run))
                result = own if run == runs[0] else result
        except lost as error:
            raise _LostError from error
        except ray.exceptions.RayTaskError as error:  # what an actor says whose peer has died, among others
            if _any_lost(ray, waiting, lost):
                raise _LostError from error
            raise
    return result


def _any_lost(ray: Any, runs: list[Any], lost: tuple[type[BaseException], ...]) -> bool:
    """Whether one of some actors turns out to have died soon after another has failed."""
    end = time.monotonic() + GRACE
    while runs and time.monotonic() < end:
        ready, runs = ray.wait(runs, timeout=LOOK)
        for run in ready:
            try:
                ray.get(run)
            except lost:
                return True
            except ray.exceptions.RayTaskError:
                continue
    return False


class _Actor:
    """One of the processes of a run."""

    def __init__(self, index: int, count: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self.index, self.count = index, count
        self.seen: list[Event] = []

    def address(self) -> str:
        """Return where the processes of a run meet: a free port of this machine."""
        ray: Any = require("ray", "ray")
        with socket.socket() as free:
            free.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def events(self, since: int) -> list[Event]:
        """Return what was reported since."""
        return self.seen[since:]

    def run(self, address: str, sent: list[Any], plain: dict[str, Any]) -> bytes:
        """Do the share of this process."""
        ray: Any = require("ray", "ray")
        work = unpacked(ray.get(sent[0]))
        runtime = Runtime(**plain, on_event=self.seen.append)
        distributed: Any = torch.distributed
        distributed.init_process_group(
            "gloo", init_method=address, rank=self.index, world_size=self.count, timeout=PATIENCE
        )
        try:
            return outcome_of(lambda: work(runtime, Ranks.of_launch(self.index, self.count)))
        finally:
            distributed.destroy_process_group()
