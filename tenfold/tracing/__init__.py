"""Run models on inputs of any kind, and record their data flow."""

from tenfold.tracing.contexts import device_of, evaluating
from tenfold.tracing.input_batches import gathered
from tenfold.tracing.inputs import batch_size_of, call_model, to_device
from tenfold.tracing.references import copied

__all__ = [
    "batch_size_of",
    "call_model",
    "copied",
    "device_of",
    "evaluating",
    "gathered",
    "to_device",
]
