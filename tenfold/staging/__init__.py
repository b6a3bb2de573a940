"""Compress a little, train, and again: multi-stage compression with your own loop or the built-in one."""

from tenfold.staging.run import stages
from tenfold.staging.schedule import Schedule
from tenfold.staging.stage import Stage
from tenfold.staging.tuned import run_stages, tune_stage

__all__ = ["Schedule", "Stage", "run_stages", "stages", "tune_stage"]
