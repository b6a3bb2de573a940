"""Save and load without pickle: a folder that is whole or not there."""

from tenfold.checkpoint.folder import load, save
from tenfold.checkpoint.weights import read_weights, write_weights

__all__ = ["load", "read_weights", "save", "write_weights"]
