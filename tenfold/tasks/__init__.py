"""Tasks for the command line and the benchmarks: a model, its data, its score. Adding a file here adds a task."""

from importlib import import_module
from pkgutil import iter_modules

from tenfold.tasks.base import TASKS, SizedBatches, Task, accuracy, seeded
from tenfold.tasks.dense_weights import load_weights
from tenfold.tasks.images import ImageTransform
from tenfold.tasks.in_memory import InMemoryTask, TensorSet, Transform
from tenfold.tasks.loading import load_task

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "TASKS",
    "ImageTransform",
    "InMemoryTask",
    "SizedBatches",
    "Task",
    "TensorSet",
    "Transform",
    "accuracy",
    "load_task",
    "load_weights",
    "seeded",
]
