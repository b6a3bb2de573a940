"""Groups of layers that are narrowed together. A module registers one kind of unit; adding a file here adds a kind."""

from importlib import import_module
from pkgutil import iter_modules

from tenfold.units.base import UNITS, Narrowing, PivotFit, Size, UnitKind

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["UNITS", "Narrowing", "PivotFit", "Size", "UnitKind"]
