"""Run models and see their data flow: inputs of any kind, layers, contexts, hooks and replays."""

from tenfold.tracing.contexts import device_of, evaluating
from tenfold.tracing.inputs import batch_size_of, call_model, gathered, to_device

__all__ = [
    "batch_size_of",
    "call_model",
    "device_of",
    "evaluating",
    "gathered",
    "to_device",
]
