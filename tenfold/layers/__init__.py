"""How a factorized weight runs: the layer that stands in for a dense one, and layers that are trains from the start."""

from tenfold.layers.describe import Contract, build, dense_weight, describe, own_layout
from tenfold.layers.factorized import FactorizedLayer, FitSummary, stage_specs
from tenfold.layers.orthogonal_tt import orthogonal_init_, orthogonalize_, stiefel_params
from tenfold.layers.recurrent import GRU, LSTM, Recurrent, open_recurrent
from tenfold.layers.tt_embedding import TTEmbedding, TTEmbeddingBag
from tenfold.layers.tt_linear import TTLinear
from tenfold.layers.tt_recurrent import TTGRU, TTLSTM

__all__ = [
    "GRU",
    "LSTM",
    "TTGRU",
    "TTLSTM",
    "Contract",
    "FactorizedLayer",
    "FitSummary",
    "Recurrent",
    "TTEmbedding",
    "TTEmbeddingBag",
    "TTLinear",
    "build",
    "dense_weight",
    "describe",
    "open_recurrent",
    "orthogonal_init_",
    "orthogonalize_",
    "own_layout",
    "stage_specs",
    "stiefel_params",
]
