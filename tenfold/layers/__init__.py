"""How a factorized weight runs: geometry of torch layers, and the layer that stands in for a dense one."""

from tenfold.layers.describe import Contract, build, describe
from tenfold.layers.factorized import FactorizedLayer, FitSummary, stage_specs

__all__ = ["Contract", "FactorizedLayer", "FitSummary", "build", "describe", "stage_specs"]
