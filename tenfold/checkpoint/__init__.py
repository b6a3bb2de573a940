"""Save and load compressed models as folders, atomically and without pickle."""

from tenfold.checkpoint.model_folder import ANALYSIS, check_target, load, read_record, save
from tenfold.checkpoint.pretrained import load_pretrained, save_pretrained
from tenfold.checkpoint.weights_file import read_weights, write_weights
from tenfold.tensors import digest

__all__ = [
    "ANALYSIS",
    "check_target",
    "digest",
    "load",
    "load_pretrained",
    "read_record",
    "read_weights",
    "save",
    "save_pretrained",
    "write_weights",
]
