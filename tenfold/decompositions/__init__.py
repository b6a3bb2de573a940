"""How factors are found. Each module registers algorithms; adding a file here adds one."""

from importlib import import_module
from pkgutil import iter_modules

from tenfold.decompositions.base import (
    DECOMPOSITIONS,
    AwareDecomposition,
    Decomposition,
    Factors,
    Fit,
    Problem,
    decompose,
    decompose_many,
    default_algorithm,
    spec_of_weight,
)
from tenfold.decompositions.metric import Moments
from tenfold.decompositions.recompress import recompress, reduce
from tenfold.decompositions.sketch import Sketch

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "DECOMPOSITIONS",
    "AwareDecomposition",
    "Decomposition",
    "Factors",
    "Fit",
    "Moments",
    "Problem",
    "Sketch",
    "decompose",
    "decompose_many",
    "default_algorithm",
    "recompress",
    "reduce",
    "spec_of_weight",
]
