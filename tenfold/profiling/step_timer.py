"""Timer of the steps of a long job."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Observe = Callable[[str], None]


class StepTimer:
    """Reports the steps of a job to an observer as they start, and adds up their seconds.

    Example:
        >>> steps = StepTimer(print)
        >>> with steps("plan"):
        ...     pass
        plan
        >>> list(steps.seconds)
        ['plan']
    """

    def __init__(self, observe: Observe | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._observe = observe

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a step within the context."""
        if self._observe is not None:
            self._observe(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
