"""Runtimes that a model may run in: how each builds, runs and times it. Adding a file here adds a runtime."""

from importlib import import_module
from pkgutil import iter_modules

from tenfold.runtimes.base import (
    RUNTIMES,
    Block,
    Compare,
    Conditions,
    LayerPair,
    TargetRuntime,
    runtime_named,
)

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["RUNTIMES", "Block", "Compare", "Conditions", "LayerPair", "TargetRuntime", "runtime_named"]
