"""Layers of a model, with their geometry and the parameters that each of them holds or shares."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from torch import Tensor, nn
from torch.nn import UninitializedParameter
from torch.nn.utils import parametrize

from tenfold.errors import ProfileError
from tenfold.layers import FactorizedLayer, is_quantized, spec_of
from tenfold.records import LayerSpec


@dataclass(frozen=True, eq=False)
class Entry:
    """A layer of a model: a module with its subtree, or without its children if these are layers themselves.

    ``params`` and ``bytes`` do not count what an earlier entry holds already, so that they add up to the model's.
    """

    path: str
    aliases: tuple[str, ...]
    tied: tuple[str, ...]
    module: nn.Module
    spec: LayerSpec | None
    reason: str
    params: int
    bytes: int


def entries(model: nn.Module) -> tuple[Entry, ...]:
    """Return the layers of a model in the order of ``named_modules``.

    A layer is a leaf, a module that a format supports, a factorized layer, a parametrized module, or any other module
    that holds parameters or buffers itself (``nn.MultiheadAttention``). Modules inside a supported, factorized or
    parametrized layer are no layers of their own.

    Raises:
        ProfileError: a parameter is lazy and has no size yet.

    Example:
        >>> [e.path for e in entries(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))]
        ['0', '1']
    """
    _refuse_lazy(model)
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    layers = list(_layers(model))
    holders = _holders(layers)
    seen: set[int] = set()
    result = []
    for path, module, whole in layers:
        parameters, buffers = _held(module, whole=whole)
        fresh = [t for t in parameters if id(t) not in seen]
        fresh_buffers = [t for t in buffers if id(t) not in seen]
        seen.update(id(t) for t in (*parameters, *buffers))
        spec, reason = (module.spec, "") if isinstance(module, FactorizedLayer) else spec_of(module)
        sharing = dict.fromkeys(p for t in parameters for p in holders[id(t)] if p != path)
        result.append(
            Entry(
                path=path,
                aliases=tuple(p for p in paths[id(module)] if p != path),
                tied=tuple(sharing),
                module=module,
                spec=spec,
                reason=reason,
                params=sum(t.numel() for t in fresh),
                bytes=sum(t.numel() * t.element_size() for t in (*fresh, *fresh_buffers)),
            )
        )
    return tuple(result)


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """Iterate over (path, module, whether it stands for its whole subtree), every module once."""
    inside: set[int] = set()
    for path, module in model.named_modules():
        if id(module) in inside:
            continue
        leaf = next(module.children(), None) is None
        whole = leaf or _stands_for_its_inside(module)
        if whole:
            inside.update(id(m) for m in module.modules() if m is not module)
        if whole or any(True for _ in chain(module.parameters(recurse=False), module.buffers(recurse=False))):
            yield path, module, whole


def _stands_for_its_inside(module: nn.Module) -> bool:
    if isinstance(module, FactorizedLayer) or parametrize.is_parametrized(module) or is_quantized(module):
        return True
    return spec_of(module)[0] is not None


def _held(module: nn.Module, *, whole: bool) -> tuple[list[Tensor], list[Tensor]]:
    return list(module.parameters(recurse=whole)), list(module.buffers(recurse=whole))


def _holders(layers: list[tuple[str, nn.Module, bool]]) -> dict[int, list[str]]:
    """Return, for every parameter, the paths of the layers that hold it."""
    holders: dict[int, list[str]] = {}
    for path, module, whole in layers:
        for parameter in _held(module, whole=whole)[0]:
            holders.setdefault(id(parameter), []).append(path)
    return holders


def _refuse_lazy(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            msg = f"the parameter {name} is lazy and has no size yet: run the model once on real inputs first"
            raise ProfileError(msg)
