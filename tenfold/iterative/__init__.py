"""Compress a little, train, and again: multi-stage compression with your own loop or the built-in one."""

from tenfold.allocation.schedule import Schedule, musco
from tenfold.iterative.run import stages
from tenfold.iterative.stage import Stage
from tenfold.iterative.with_training import Training, compress_iteratively, tune_stage

__all__ = ["Schedule", "Stage", "Training", "compress_iteratively", "musco", "stages", "tune_stage"]
