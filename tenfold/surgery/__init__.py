"""Put factorized layers into a model, take them out again, and re-estimate batch norm."""

from tenfold.surgery.apply import FIT_LAYERS, apply, apply_, densify, densify_, fits_of, restructure_, with_errors
from tenfold.surgery.architectures import as_block, as_blocks
from tenfold.surgery.batchnorm import reestimate_batchnorm_
from tenfold.surgery.batchnorm_pairs import FusedPairs, fusable_pairs
from tenfold.surgery.config_note import MARK, NOTE, note_in_config_, plan_in_note
from tenfold.surgery.fuse_batchnorm import FusedNorm, fuse_batchnorm, fuse_batchnorm_, fuse_pairs_, fused_pairs
from tenfold.surgery.modules import find, paths_of, put
from tenfold.surgery.recognise_units import recognise_units
from tenfold.surgery.refine import RefinedBlock, Refinement, refine_blocks_
from tenfold.surgery.separate import separate, separate_, separated
from tenfold.surgery.separate_attention import joined_projections
from tenfold.surgery.sequential import SequentialFit, apply_sequentially
from tenfold.surgery.share_kernels import bank_ranks, equal_kernels, share_kernels, unshare_kernels
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
    "FIT_LAYERS",
    "MARK",
    "NOTE",
    "FusedNorm",
    "FusedPairs",
    "RefinedBlock",
    "Refinement",
    "SequentialFit",
    "apply",
    "apply_",
    "apply_sequentially",
    "as_block",
    "as_blocks",
    "bank_ranks",
    "densify",
    "densify_",
    "equal_kernels",
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
    "note_in_config_",
    "paths_of",
    "plan_in_note",
    "put",
    "recognise_units",
    "reestimate_batchnorm_",
    "refine_blocks_",
    "restack_",
    "restructure_",
    "separate",
    "separate_",
    "separated",
    "share_kernels",
    "stacks",
    "unroll_rnns",
    "unroll_rnns_",
    "unrolled_rnns",
    "unshare_kernels",
    "unstack_",
    "unstacked",
    "verify",
    "warn_of_costs",
    "with_errors",
]
