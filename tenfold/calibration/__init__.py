"""Input statistics and output-gradient covariances of layers, from unlabeled batches."""

from tenfold.calibration.calibrate import calibrate, called_layers

__all__ = ["calibrate", "called_layers"]
