"""Base of all kinds of units: which layers belong together, what sizes cost, and who absorbs which factor."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from tenfold.formats import Factorization, Rank
from tenfold.layers import FactorizedLayer
from tenfold.records import Call, Cost, LayerProfile, LayerSpec, Profile, Unit
from tenfold.registry import Registry

Size = dict[str, int]

# Few sizes are asked for of small layers, and of large ones no more than so many.
_STEPS = ((16, 1), (32, 2), (64, 4), (1024, 8))
_MOST_SIZES = 128


@dataclass(frozen=True)
class PivotFit:
    """What the pivot of a unit becomes at one size, before its inner factor is absorbed.

    Attributes:
        format: of the pivot.
        rank: of the pivot, by name.
        algorithm: name and settings of the algorithm whose factors have the structure that others can absorb.
    """

    format: str
    rank: Rank
    algorithm: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Narrowing:
    """What takes the place of the layers of a unit.

    Attributes:
        modules: plain layers of the smaller sizes, by path.
        attributes: what modules that stay have to know of the new sizes, such as the size of a head: by path of the
            module and name of its attribute.
    """

    modules: Mapping[str, nn.Module]
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class UnitKind(abc.ABC):
    """One kind of unit: its subclasses have no fields, and their first docstring line is what ``tenfold list`` shows.

    Attributes:
        default: whether a recipe that names no units uses it.
        size_names: names of its sizes.
    """

    default: ClassVar[bool] = True
    size_names: ClassVar[tuple[str, ...]]

    @classmethod
    def name(cls) -> str:
        """Return the name under which the kind is registered."""
        return next((n for n, c in UNITS.loaded() if c is cls), cls.__name__)

    @abc.abstractmethod
    def candidates(self, model: nn.Module, profile: Profile) -> Iterator[Unit]:
        """Iterate over what could be units by shapes and names alone; a forward of the model confirms them later.

        One that has a ``keep_reason`` is not tried, and stays with that reason.
        """

    @abc.abstractmethod
    def geometry(self, unit: Unit, size: Size, specs: Mapping[str, LayerSpec]) -> dict[str, LayerSpec]:
        """Return the geometry of the members at a size, by path, of those members that have one.

        Args:
            unit: of this kind.
            size: by name.
            specs: the geometry of the members as they are.
        """

    @abc.abstractmethod
    def pivot_fit(self, unit: Unit, size: Size) -> PivotFit:
        """Return what the pivot becomes at a size: the inner factor has the structure that the feeders can absorb."""

    @abc.abstractmethod
    def sample(self, model: nn.Module, unit: Unit, size: Size) -> Factorization:
        """Return some factors of the pivot with that structure, found without data: forwards are compared with them.

        They need not be near the weight, but of the same dtype and on the same device.
        """

    def watched(self, unit: Unit) -> str:
        """Return the path of a module whose outputs stay the same when the factor is absorbed: by default the pivot."""
        return unit.pivot

    def obstacle(self, model: nn.Module, unit: Unit) -> str | None:
        """Return why a forward does not confirm a unit, where modules show it; None for the general reason."""
        del model, unit
        return None

    @abc.abstractmethod
    def narrowed(self, model: nn.Module, unit: Unit, size: Size, pivot: FactorizedLayer | None) -> Narrowing:
        """Return the layers of a unit at a size.

        Args:
            model: holds all members as they are, the pivot too.
            unit: of this kind.
            size: by name.
            pivot: the pivot with the factors that were found; the feeders absorb its inner factor, exactly. None for
                the structure alone, with values that do not matter.
        """

    def stands_out(self, unit: Unit, profile: Profile) -> bool:
        """Whether one that a forward does not confirm is worth a line in the plan; many shapes are alike by chance."""
        del profile
        return unit.keep_reason is not None

    def sizes(self, unit: Unit, step: int | None = None) -> tuple[Size, ...]:
        """Return the sizes to choose among, from small to large, without the full one.

        Multiples of a step that suits the hardware: of 8, and finer in small layers, unless ``step`` says so.
        """
        (name,) = self.size_names
        full = unit.full[name]
        stride = step or next((s for most, s in _STEPS if full <= most), None) or 8 * -(-full // (8 * _MOST_SIZES))
        return tuple({name: size} for size in range(stride, full, stride))

    def costs(self, unit: Unit, size: Size, profile: Profile) -> dict[str, Cost]:
        """Return what each member costs at a size, by path, and under "" what they compute outside of layers."""
        known = {path: profile.layer(path) for path in unit.members}
        specs = {path: layer.spec for path, layer in known.items() if layer.spec is not None}
        narrow = self.geometry(unit, size, specs)
        costs = {
            path: Cost(
                params=spec.num_params,
                macs=sum(spec.macs(call.in_shape) * call.count for call in narrowed_calls(known[path], spec)),
            )
            for path, spec in narrow.items()
        }
        return {"": Cost(macs=self.other_macs(unit, size, profile))} | costs

    def other_macs(self, unit: Unit, size: Size, profile: Profile) -> int:
        """Return the multiply-accumulates that a size takes outside of layers, such as those of attention scores."""
        del unit, size, profile
        return 0


def narrowed_calls(layer: LayerProfile, spec: LayerSpec) -> tuple[Call, ...]:
    """Return the calls of a layer as they will be with another number of input channels.

    Example:
        >>> layer = LayerProfile(kind="", path="", params=0, bytes=0, macs=0, calls=(Call(in_shape=(2, 7, 64)),))
        >>> narrowed_calls(layer, LayerSpec(kind="linear", in_channels=48, out_channels=8))[0].in_shape
        (2, 7, 48)
    """

    def shape(old: tuple[int, ...]) -> tuple[int, ...]:
        place = len(old) - 1 - spec.axes
        return (*old[:place], spec.in_channels, *old[place + 1 :])

    return tuple(
        call.replace(in_shape=shape(call.in_shape), out_shape=spec.out_shape(shape(call.in_shape)))
        for call in layer.calls
        if call.in_shape
    )


def like(tensor: Tensor | None, module: nn.Module) -> Tensor | None:
    """Return a tensor in the dtype and on the device of a module's weight."""
    weight: Any = module.weight
    return None if tensor is None else tensor.to(weight)


UNITS: Registry[UnitKind] = Registry("unit")
