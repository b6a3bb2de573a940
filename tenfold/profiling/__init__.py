"""What a model costs: parameters, MACs, calls and milliseconds, from real forwards on example inputs."""

from tenfold.profiling.calibration import calibrate, called_layers
from tenfold.profiling.clock import Clock
from tenfold.profiling.counting import MacCounter
from tenfold.profiling.environment import environment
from tenfold.profiling.inputs import batch_size_of, call_model, gathered, to_device
from tenfold.profiling.latency import Comparison, compare_latency, measure_latency
from tenfold.profiling.memory_format import best_memory_format, to_memory_format
from tenfold.profiling.modes import device_of, evaluating
from tenfold.profiling.profile import profile

__all__ = [
    "Clock",
    "Comparison",
    "MacCounter",
    "batch_size_of",
    "best_memory_format",
    "calibrate",
    "call_model",
    "called_layers",
    "compare_latency",
    "device_of",
    "environment",
    "evaluating",
    "gathered",
    "measure_latency",
    "profile",
    "to_device",
    "to_memory_format",
]
