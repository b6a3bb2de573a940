"""What modules remember from one forward to the next, set back after each."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.tensors import version_of
from tenfold.tracing.inputs import tensors_in

_CONTAINERS = (dict, OrderedDict, list, set, deque)


class Memory:
    """The attributes and buffers of all modules as they are now, to be set back after a forward.

    Containers are set back one level deep. Tensors that are written to in place get their values back.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(path, module, attributes(module)) for path, module in model.named_modules()]
        parts = (value for _, _, own in self._modules for value in own.values() if type(value) in _CONTAINERS)
        self._contents = {id(part): (part, part.copy()) for part in parts}
        self._tensors: dict[int, tuple[Tensor, int | None, Tensor]] = {}
        for _, _, own in self._modules:
            for tensor in tensors_in(list(own.values())):
                if not isinstance(tensor, nn.Parameter):
                    self._tensors[id(tensor)] = (tensor, version_of(tensor), tensor.detach().clone())

    def restore(self) -> tuple[bool, set[str]]:
        """Set everything back; return whether anything had changed, and the modules whose plain values had."""
        changed, plain = False, set[str]()
        for path, module, before in self._modules:
            now = attributes(module)
            other = [name for name in {**before, **now} if before.get(name, self) is not now.get(name, self)]
            same = (self._contents[id(v)] for v in before.values() if id(v) in self._contents)
            moved = [new for new, old in same if not _alike(new, old)]
            changed |= bool(other or moved)
            if not all(_of_tensors(value) for value in (*(now.get(name) for name in other), *moved)):
                plain.add(path)
            for name in other:
                if name in before:
                    vars(module)[name] = before[name]
                else:
                    del vars(module)[name]
        for part, content in self._contents.values():
            if not _alike(part, content):
                part.clear()
                (part.update if isinstance(part, dict | set) else part.extend)(content)
        with torch.no_grad():
            for tensor, version, value in self._tensors.values():
                if version_of(tensor) != version:
                    changed = True
                    tensor.copy_(value)
        return changed, plain


def attributes(module: nn.Module) -> dict[str, Any]:
    """Return what a module holds by name, buffers in a dict, without parameters, modules and hooks."""
    return {k: v for k, v in vars(module).items() if k not in {"_parameters", "_modules"} and not k.endswith("_hooks")}


def _alike(part: Any, content: Any) -> bool:
    if isinstance(part, dict):
        return part.keys() == content.keys() and all(part[key] is content[key] for key in part)
    if isinstance(part, set):
        return bool(part == content)
    return len(part) == len(content) and all(a is b for a, b in zip(part, content, strict=True))


def _of_tensors(value: Any) -> bool:
    """Whether all that changed are tensors: who reads these is seen."""
    values = list(value.values() if isinstance(value, dict) else value) if type(value) in _CONTAINERS else [value]
    return bool(values) and all(isinstance(each, Tensor) or each is None for each in values)
