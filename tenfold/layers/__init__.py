"""How a factorized weight runs: the layer that stands in for a dense one, and layers that are trains from the start."""

from tenfold.layers.attention_parts import JoinedProjections, SeparateAttention
from tenfold.layers.cp_regression import CPRegression
from tenfold.layers.dense_layers import dense_weight, is_quantized, own_layout, spec_of
from tenfold.layers.factorized import FactorizedLayer, FitSummary, stage_specs
from tenfold.layers.map_linear import MapLinear
from tenfold.layers.orthogonal_tt import orthogonal_init_, orthogonalize_, stiefel_params
from tenfold.layers.padded_conv import PaddedConv, same_pads
from tenfold.layers.padded_heads import PaddedHeads, UnpaddedHeads
from tenfold.layers.recurrent import GRU, LSTM, Recurrent, open_recurrent
from tenfold.layers.stacked import Stack, StackedLinear, stacked_parameters
from tenfold.layers.sublayers import Contract, build, empty_weight, held
from tenfold.layers.tensor_contraction import TensorContraction
from tenfold.layers.tensor_regression import TensorRegression
from tenfold.layers.tt_embedding import TTEmbedding, TTEmbeddingBag
from tenfold.layers.tt_linear import TTLinear
from tenfold.layers.tt_recurrent import TTGRU, TTLSTM
from tenfold.layers.tt_regression import TTRegression
from tenfold.layers.tucker_regression import TuckerRegression

__all__ = [
    "GRU",
    "LSTM",
    "TTGRU",
    "TTLSTM",
    "CPRegression",
    "Contract",
    "FactorizedLayer",
    "FitSummary",
    "JoinedProjections",
    "MapLinear",
    "PaddedConv",
    "PaddedHeads",
    "Recurrent",
    "SeparateAttention",
    "Stack",
    "StackedLinear",
    "TTEmbedding",
    "TTEmbeddingBag",
    "TTLinear",
    "TTRegression",
    "TensorContraction",
    "TensorRegression",
    "TuckerRegression",
    "UnpaddedHeads",
    "build",
    "dense_weight",
    "empty_weight",
    "held",
    "is_quantized",
    "open_recurrent",
    "orthogonal_init_",
    "orthogonalize_",
    "own_layout",
    "same_pads",
    "spec_of",
    "stacked_parameters",
    "stage_specs",
    "stiefel_params",
]
