"""Rank rules. Each module registers its own; adding a file here adds a rule."""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
