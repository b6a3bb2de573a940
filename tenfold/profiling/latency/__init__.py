"""Latency of models, measured in turns, and of layers, from a lookup table."""

from tenfold.profiling.latency.lookup_table import LatencyTable
from tenfold.profiling.latency.measure import Comparison, compare_latency, measure_latency
from tenfold.profiling.latency.memory_format import best_memory_format, to_memory_format

__all__ = [
    "Comparison",
    "LatencyTable",
    "best_memory_format",
    "compare_latency",
    "measure_latency",
    "to_memory_format",
]
