"""Input statistics and output-gradient covariances of layers, from unlabeled batches."""

from tenfold.calibration.calibrate import calibrate, calibrate_part, called_layers, judged_apart
from tenfold.calibration.needs import Needs

__all__ = ["Needs", "calibrate", "calibrate_part", "called_layers", "judged_apart"]
