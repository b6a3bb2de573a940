"""Put factorized layers into a model, take them out again, and re-estimate batch norm."""

from tenfold.surgery.apply import apply, apply_, densify, densify_, fits_of, restructure_, with_errors
from tenfold.surgery.batchnorm import reestimate_batchnorm_
from tenfold.surgery.batchnorm_pairs import FusedPairs, fusable_pairs
from tenfold.surgery.fuse_batchnorm import FusedNorm, fuse_batchnorm, fuse_batchnorm_, fuse_pairs_, fused_pairs
from tenfold.surgery.modules import find, paths_of, put
from tenfold.surgery.opened import open_layers, open_layers_, openable, opened
from tenfold.surgery.sequential import SequentialFit, apply_sequentially
from tenfold.surgery.unroll_rnn import (
    fuse_rnns_,
    fused_rnns,
    unroll_rnns,
    unroll_rnns_,
    unrolled_rnns,
)
from tenfold.surgery.verify import verify, warn_of_costs

__all__ = [
    "FusedNorm",
    "FusedPairs",
    "SequentialFit",
    "apply",
    "apply_",
    "apply_sequentially",
    "densify",
    "densify_",
    "find",
    "fits_of",
    "fusable_pairs",
    "fuse_batchnorm",
    "fuse_batchnorm_",
    "fuse_pairs_",
    "fuse_rnns_",
    "fused_pairs",
    "fused_rnns",
    "open_layers",
    "open_layers_",
    "openable",
    "opened",
    "paths_of",
    "put",
    "reestimate_batchnorm_",
    "restructure_",
    "unroll_rnns",
    "unroll_rnns_",
    "unrolled_rnns",
    "verify",
    "warn_of_costs",
    "with_errors",
]
