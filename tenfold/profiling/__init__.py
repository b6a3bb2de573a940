"""Cost of a model: parameters, MACs, calls and milliseconds, from real forwards on example inputs."""

from tenfold.profiling.compare_outputs import Original, agreement
from tenfold.profiling.counting import MacCounter
from tenfold.profiling.environment import environment
from tenfold.profiling.generation import Generation, compare_generation
from tenfold.profiling.latency import (
    Comparison,
    LatencyTable,
    best_memory_format,
    compare_latency,
    measure_latency,
    to_memory_format,
)
from tenfold.profiling.profile import profile

__all__ = [
    "Comparison",
    "Generation",
    "LatencyTable",
    "MacCounter",
    "Original",
    "agreement",
    "best_memory_format",
    "compare_generation",
    "compare_latency",
    "environment",
    "measure_latency",
    "profile",
    "to_memory_format",
]
