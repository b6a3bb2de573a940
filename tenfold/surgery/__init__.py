"""Put factorized layers into a model, take them out again, and re-estimate batch norm."""

from tenfold.surgery.apply import apply, apply_, densify, densify_, fits_of, restructure_, with_errors
from tenfold.surgery.batchnorm import reestimate_batchnorm_
from tenfold.surgery.batchnorm_pairs import FusedPairs, fusable_pairs
from tenfold.surgery.fuse_batchnorm import FusedNorm, fuse_batchnorm, fuse_batchnorm_, fuse_pairs_, fused_pairs
from tenfold.surgery.modules import find, paths_of, put
from tenfold.surgery.recognise_units import recognise_units
from tenfold.surgery.refine import RefinedBlock, Refinement, refine_blocks_
from tenfold.surgery.separate import separate, separate_, separated
from tenfold.surgery.separate_attention import joined_projections
from tenfold.surgery.sequential import SequentialFit, apply_sequentially
from tenfold.surgery.unroll_rnn import (
    fuse_rnns_,
    fused_rnns,
    unroll_rnns,
    unroll_rnns_,
    unrolled_rnns,
)
from tenfold.surgery.unstack import restack_, stacks, unstack_, unstacked
from tenfold.surgery.verify import verify, warn_of_costs

__all__ = [
    "FusedNorm",
    "FusedPairs",
    "RefinedBlock",
    "Refinement",
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
    "joined_projections",
    "paths_of",
    "put",
    "recognise_units",
    "reestimate_batchnorm_",
    "refine_blocks_",
    "restack_",
    "restructure_",
    "separate",
    "separate_",
    "separated",
    "stacks",
    "unroll_rnns",
    "unroll_rnns_",
    "unrolled_rnns",
    "unstack_",
    "unstacked",
    "verify",
    "warn_of_costs",
    "with_errors",
]
