"""Formats of factorized weights. Each module registers one; adding a file here adds a format."""

from importlib import import_module
from pkgutil import iter_modules

from tenfold.formats.base import FORMATS, Factorization, Rank, Reduced, Structure, SubLayer, join_groups, split_groups
from tenfold.formats.matrix import MatrixFormat
from tenfold.formats.rank_one_sum import Kruskal
from tenfold.formats.tucker2 import Tucker2

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "FORMATS",
    "Factorization",
    "Kruskal",
    "MatrixFormat",
    "Rank",
    "Reduced",
    "Structure",
    "SubLayer",
    "Tucker2",
    "join_groups",
    "split_groups",
]
