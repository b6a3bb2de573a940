"""Find linear layers that take flattened feature maps, and let them know the shape of these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from tenfold.errors import PlanError
from tenfold.layers import FactorizedLayer, MapLinear, spec_of
from tenfold.records import Shape
from tenfold.surgery.modules import find, put
from tenfold.tensors import untransformed
from tenfold.tracing.inputs import shape_of, tensors_in
from tenfold.tracing.trace import trace
from tenfold.tracing.watchers import ModuleCall, Operation, Watcher

_KIND = "map "
_AXES = (3, 4, 5)  # of a batch of maps with one to three spatial axes
_COPIES = ("clone", "contiguous", "_to_copy")
_SHAPES = ("view", "_unsafe_view", "reshape", "flatten", "squeeze", "alias")


def flattened_maps(model: nn.Module, inputs: Any) -> dict[str, str]:
    """Return the paths of linear layers that take flattened maps, each with ``"map "`` and the shape of one.

    One forward is watched: what flattens all axes but the first, in memory order or by a copy, makes a map flat, and
    the layer takes the very tensor that comes of it, whenever it runs.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 4, 10), nn.Linear(10, 2))
        >>> flattened_maps(net, torch.zeros(1, 3, 6, 6))
        {'3': 'map 8 4 4'}
    """
    linear = {path for path, module in model.named_modules() if _plain(module)}
    if not linear:
        return {}
    watcher = _Maps(linear)
    trace(model, inputs, watchers=[watcher])
    return {path: _kind(shape) for path, shape in watcher.taken.items() if shape is not None}


def mapped(model: nn.Module) -> dict[str, str]:
    """Return the paths of layers that know their map, each with its kind as ``flattened_maps`` has it."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        modes = module.spec.in_modes if isinstance(module, FactorizedLayer) else getattr(module, "in_modes", ())
        if isinstance(module, FactorizedLayer | MapLinear) and modes:
            found[path] = _kind(modes)
    return found


def is_map(kind: str) -> bool:
    """Whether the kind of a layer in a plan is the map that it takes."""
    return kind.startswith(_KIND)


def separate_map_(model: nn.Module, kinds: Mapping[str, str]) -> nn.Module:
    """Let the linear layers at these paths know their maps; return the model. Those that know already stay.

    Raises:
        PlanError: no linear layer at a path, or one with another number of inputs.
    """
    new: dict[str, nn.Module] = {}
    for path, kind in kinds.items():
        old = find(model, path)
        if isinstance(old, FactorizedLayer | MapLinear):
            continue
        if not isinstance(old, nn.Linear):
            msg = f"{path!r} is {type(old).__name__} in the model and a linear layer in the plan: another model's plan"
            raise PlanError(msg)
        new[path] = MapLinear.of(old, tuple(int(n) for n in kind.removeprefix(_KIND).split()))
    return put(model, new)


def _kind(shape: Shape) -> str:
    return _KIND + " ".join(map(str, shape))


def _plain(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and not isinstance(module, MapLinear) and spec_of(module)[0] is not None


class _Maps(Watcher):
    """Remembers which tensors are flattened maps, and which map each layer took: None where there were several."""

    apart: ClassVar[bool] = False

    def __init__(self, linear: set[str]) -> None:
        self.taken: dict[str, Shape | None] = {}
        self._linear = linear
        self._flat: dict[int, tuple[Tensor, Shape]] = {}  # the tensors are held, so that their ids stay their own

    def enter(self, running: tuple[ModuleCall, ...], inputs: Any) -> None:
        """Note the map that a linear layer takes."""
        path = running[-1].path
        if path in self._linear:
            shape = self._map_of(next(tensors_in(inputs), None))
            self.taken[path] = shape if self.taken.get(path, shape) == shape else None

    def operate(self, operation: Operation) -> Any:
        """Note what becomes of a map once all of its axes but the first are flattened."""
        result = operation.compute()
        if operation.name in (*_SHAPES, *_COPIES) and len(operation.inputs) == 1 and isinstance(result, Tensor):
            (before,) = operation.inputs
            old, new = shape_of(before), shape_of(result)
            known = self._map_of(before)
            if known is not None and old == new:
                self._flat[id(result)] = (result, known)
            elif len(old) in _AXES and len(new) == 2 and old[0] == new[0] and max(old[2:]) > 1:
                self._flat[id(result)] = (result, old[1:])
        return result

    def _map_of(self, tensor: Any) -> Shape | None:
        found = None if tensor is None else self._flat.get(id(untransformed(tensor)))
        return found[1] if found is not None else None
