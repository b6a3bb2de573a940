"""Algorithms that find factors. Each module registers some; adding a file here, or in a folder, adds one."""

from importlib import import_module
from pkgutil import walk_packages

from tenfold.decompositions.base import (
    DECOMPOSITIONS,
    CovarianceDecomposition,
    Decomposition,
    Factors,
    FitProblem,
    algorithm_for,
    default_algorithm,
)
from tenfold.decompositions.covariance import Sketch
from tenfold.decompositions.curves import CurveProblem, ErrorCurve, error_curve
from tenfold.decompositions.fitting import Fit, FitRequest, decompose, decompose_many, fit_batches, spec_of_weight
from tenfold.decompositions.held_out import HeldOutCurve
from tenfold.decompositions.input_moments import Moments
from tenfold.decompositions.recompress import fit_layer, layer_request, recompress

for _module in walk_packages(__path__, f"{__name__}."):
    import_module(_module.name)

__all__ = [
    "DECOMPOSITIONS",
    "CovarianceDecomposition",
    "CurveProblem",
    "Decomposition",
    "ErrorCurve",
    "Factors",
    "Fit",
    "FitProblem",
    "FitRequest",
    "HeldOutCurve",
    "Moments",
    "Sketch",
    "algorithm_for",
    "decompose",
    "decompose_many",
    "default_algorithm",
    "error_curve",
    "fit_batches",
    "fit_layer",
    "layer_request",
    "recompress",
    "spec_of_weight",
]
