"""Compress a little, train, and again: multi-stage compression with your own loop or the built-in one."""

from tenfold.iterative.run import stages
from tenfold.iterative.schedule import Schedule
from tenfold.iterative.stage import Stage
from tenfold.iterative.with_training import run_stages, tune_stage

__all__ = ["Schedule", "Stage", "run_stages", "stages", "tune_stage"]
