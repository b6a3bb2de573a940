"""Which layers have weights that others compute with: a table read for logits, a matrix taken by its parent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tenfold.layers import FactorizedLayer
from tenfold.tracing.inputs import tensors_in
from tenfold.tracing.layers import Entry


@contextmanager
def watching_reads(layers: Sequence[Entry]) -> Iterator[set[str]]:
    """Yield the paths of the layers whose weight something else computes with while the context is open.

    Questions for dtype, device or shape do not count, nor do tensors made like a weight. Not watched are layers that
    share a weight, which all of them compute with, and those that are factorized already.
    """
    known = [entry for entry in layers if entry.spec is not None and not entry.tied]
    watched = [entry for entry in known if not isinstance(entry.module, FactorizedLayer)]
    reads = _Reads({id(p): entry.path for entry in watched for p in entry.module.parameters(recurse=False)})
    with ExitStack() as stack:
        for entry in watched:
            stack.enter_context(entry.module.register_forward_pre_hook(reads.entering(entry.path), prepend=True))
            stack.enter_context(entry.module.register_forward_hook(reads.leaving(entry.path)))
        stack.enter_context(reads)
        yield reads.found


class _Reads(TorchFunctionMode):
    """Sees every torch function, and whether a weight goes into it while its own layer does not run."""

    def __init__(self, owners: dict[int, str]) -> None:
        super().__init__()
        self.found: set[str] = set()
        self._owners = owners
        self._running: Counter[str] = Counter()
        self._held: list[Tensor] = []  # so that their ids stay their own

    def entering(self, path: str) -> Any:
        def enter(_module: nn.Module, _args: Any) -> None:
            self._running[path] += 1

        return enter

    def leaving(self, path: str) -> Any:
        def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
            self._running[path] -= 1

        return leave

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function; note the weights that it computes with."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        owners = {self._owners[id(t)] for t in tensors_in((args, kwargs)) if id(t) in self._owners}
        outside = {path for path in owners if not self._running[path]}
        if outside and next(tensors_in(output), None) is not None:
            if func in _SAME and len(outside) == 1:
                self._held.append(output)
                self._owners[id(output)] = outside.pop()
            elif not _only_like(getattr(func, "__name__", "")):
                self.found |= outside
        return output


_DATA: Any = Tensor.data
_SAME = (Tensor.detach, _DATA.__get__)  # the weight itself, by another name


def _only_like(name: str) -> bool:
    """Whether a function makes a tensor of the dtype or shape of another, and does not look at its numbers."""
    return name.startswith("new") or name.endswith("_like")
