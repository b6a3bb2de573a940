"""Input statistics and output-gradient covariances of layers, from unlabeled batches."""

from tenfold.calibration.calibrate import calibrate, called_layers
from tenfold.calibration.needs import Needs

__all__ = ["Needs", "calibrate", "called_layers"]
