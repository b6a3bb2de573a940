"""Put factorized layers into a model, take them out again, and re-estimate batch norm."""

from tenfold.surgery.apply import apply, apply_, densify, densify_, fits_of, restructure_
from tenfold.surgery.batchnorm import reestimate_batchnorm_
from tenfold.surgery.modules import find, paths_of, put
from tenfold.surgery.refit import apply_in_order

__all__ = [
    "apply",
    "apply_",
    "apply_in_order",
    "densify",
    "densify_",
    "find",
    "fits_of",
    "paths_of",
    "put",
    "reestimate_batchnorm_",
    "restructure_",
]
