"""Put factorized layers into a model, take them out again, and re-estimate batch norm."""

from tenfold.surgery.apply import apply, apply_, densify, densify_, fits_of, restructure_, with_errors
from tenfold.surgery.batchnorm import reestimate_batchnorm_
from tenfold.surgery.fuse_batchnorm import FoldedNorm, fold, fold_, fold_pairs_, folds_of
from tenfold.surgery.fused_pairs import Folds, find_folds
from tenfold.surgery.modules import find, paths_of, put
from tenfold.surgery.refit import apply_in_order
from tenfold.surgery.unroll_rnn import (
    close_networks_,
    closed_networks,
    open_networks_,
    opened_networks,
    with_networks_open,
)

__all__ = [
    "FoldedNorm",
    "Folds",
    "apply",
    "apply_",
    "apply_in_order",
    "close_networks_",
    "closed_networks",
    "densify",
    "densify_",
    "find",
    "find_folds",
    "fits_of",
    "fold",
    "fold_",
    "fold_pairs_",
    "folds_of",
    "open_networks_",
    "opened_networks",
    "paths_of",
    "put",
    "reestimate_batchnorm_",
    "restructure_",
    "with_errors",
    "with_networks_open",
]
