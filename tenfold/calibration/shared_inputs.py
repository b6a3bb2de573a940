"""Sums of input moments of several layers, where those that take the very same tensor have one sum."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tenfold.calibration.moment_sums import MomentSums
from tenfold.calibration.shares import Together
from tenfold.decompositions import Moments
from tenfold.errors import DataError, TenfoldError, first_line
from tenfold.records import LayerSpec
from tenfold.tensors import untransformed, version_of


@contextmanager
def explaining(path: str) -> Iterator[None]:
    """Raise what goes wrong with the input of a layer as a DataError that names the layer."""
    try:
        yield
    except TenfoldError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        msg = f"the input of layer {path!r} cannot be measured: {first_line(error)}"
        raise DataError(msg) from error


@dataclass
class _Waiting:
    """An input of a linear layer that is added once it is known which others take it too."""

    tensor: Tensor
    version: int | None
    values: Tensor  # as they were: an operation in place may follow
    spec: LayerSpec
    options: Mapping[str, Any]
    paths: list[str]

    def is_taken(self, x: Tensor, spec: LayerSpec) -> bool:
        same = x is self.tensor and version_of(x) == self.version
        return same and (spec.kind, spec.in_channels) == (self.spec.kind, self.spec.in_channels)


@dataclass
class SharedSums:
    """The sums of layers, of which queries, keys and values, or the halves of a gated MLP, share one.

    Layers share where every input of one is that of the others too; where that ends, each goes on with its own.

    Attributes:
        own: by path; of those that share, only that of the first is added to.
        groups: by path, the layers that share with it; of one that is alone, itself.
    """

    own: dict[str, MomentSums]
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _waiting: _Waiting | None = None

    def add(self, path: str, x: Tensor, spec: LayerSpec, y: Tensor | None = None, **options: Any) -> None:
        """Add what enters one call of a layer: see ``MomentSums.add``."""
        waiting = self._waiting
        if y is None and waiting is not None and path not in waiting.paths and waiting.is_taken(x, spec):
            waiting.paths.append(path)
            return
        self.close()
        if y is not None or spec.kind != "linear" or self.groups.get(path) == (path,):
            self._part((path,))
            self.own[path].add(untransformed(x).detach(), spec, y, **options)
        else:
            self._waiting = _Waiting(x, version_of(x), untransformed(x).detach().clone(), spec, options, [path])

    def close(self) -> None:
        """Add what waits for further layers: at the end of each forward."""
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return
        paths = tuple(waiting.paths)
        if all(path not in self.groups for path in paths):
            self.groups |= dict.fromkeys(paths, paths)
        alike = self.groups.get(paths[0]) == paths
        if not alike:
            self._part(paths)
        for path in paths[:1] if alike else paths:
            with explaining(path):
                self.own[path].add(waiting.values, waiting.spec, **waiting.options)

    def _part(self, paths: tuple[str, ...]) -> None:
        """Let layers, and all that share with them, have sums of their own from now on."""
        for path in paths:
            group = self.groups.get(path, (path,))
            for other in group[1:]:
                self.own[other] = copy.deepcopy(self.own[group[0]])
            self.groups |= {other: (other,) for other in group}

    def gather(self, together: Together, specs: Mapping[str, LayerSpec]) -> None:
        """Make these the sums of all processes, each of which calls this."""
        everyones = together.everyones(self.groups)
        for path, group in list(self.groups.items()):
            if len(self.groups[path]) > 1 and any(other.get(path) != group for other in everyones):
                self._part((path,))
        for path, spec in specs.items():
            if self.groups.get(path, (path,))[0] == path:
                self.own[path].gather(together, spec)

    def moments(self) -> dict[str, Moments]:
        """Return the moments of the layers that were reached, the same object for those that share.

        Raises:
            DataError: no layer was reached, or inputs are not finite.
        """
        first = {path: self.groups.get(path, (path,))[0] for path in self.own}
        reached = [path for path in self.own if self.own[first[path]].count] or list(self.own)
        found = {path: self.own[path].moments(path) for path in dict.fromkeys(first[path] for path in reached)}
        return {path: found[first[path]] for path in reached}
