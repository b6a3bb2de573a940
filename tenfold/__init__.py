"""tenfold makes trained PyTorch networks smaller and really faster by tensor decomposition.

One natural way through::

    model + example inputs ── profile ──▶ Profile ── plan ──▶ Plan ── apply ──▶ smaller model ── finetune ──▶ ── save

Each arrow is a function here, each thing between two arrows a small frozen object; ``compress`` is these in a row.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Budget": "tenfold.records",
    "Calibration": "tenfold.records",
    "Compressed": "tenfold.pipeline",
    "Distillation": "tenfold.training",
    "Event": "tenfold.progress",
    "ExportRecord": "tenfold.records",
    "Fit": "tenfold.decompositions",
    "LayerSpec": "tenfold.records",
    "Metric": "tenfold.records",
    "OptionTable": "tenfold.records",
    "Plan": "tenfold.records",
    "Profile": "tenfold.records",
    "Recipe": "tenfold.records",
    "RunRecord": "tenfold.records",
    "Runtime": "tenfold.runtime",
    "Schedule": "tenfold.iterative",
    "Score": "tenfold.planning",
    "Sensitivity": "tenfold.planning",
    "Task": "tenfold.tasks",
    "TenfoldError": "tenfold.errors",
    "TuneConfig": "tenfold.training",
    "Workers": "tenfold.parallel",
    "agreement": "tenfold.profiling",
    "apply": "tenfold.surgery",
    "apply_": "tenfold.surgery",
    "calibrate": "tenfold.calibration",
    "choose": "tenfold.allocation",
    "compare_latency": "tenfold.profiling",
    "Training": "tenfold.iterative",
    "compress": "tenfold.pipeline",
    "compress_iteratively": "tenfold.iterative",
    "decompose": "tenfold.decompositions",
    "densify": "tenfold.surgery",
    "densify_": "tenfold.surgery",
    "export": "tenfold.exporting",
    "finetune": "tenfold.training",
    "fuse_batchnorm": "tenfold.surgery",
    "fuse_batchnorm_": "tenfold.surgery",
    "load": "tenfold.checkpoint",
    "plan": "tenfold.planning",
    "profile": "tenfold.profiling",
    "reestimate_batchnorm_": "tenfold.surgery",
    "save": "tenfold.checkpoint",
    "stages": "tenfold.iterative",
    "tabulate": "tenfold.planning",
}

__all__ = [
    "Budget",
    "Calibration",
    "Compressed",
    "Distillation",
    "Event",
    "ExportRecord",
    "Fit",
    "LayerSpec",
    "Metric",
    "OptionTable",
    "Plan",
    "Profile",
    "Recipe",
    "RunRecord",
    "Runtime",
    "Schedule",
    "Score",
    "Sensitivity",
    "Task",
    "TenfoldError",
    "Training",
    "TuneConfig",
    "Workers",
    "agreement",
    "apply",
    "apply_",
    "calibrate",
    "choose",
    "compare_latency",
    "compress",
    "compress_iteratively",
    "decompose",
    "densify",
    "densify_",
    "export",
    "finetune",
    "fuse_batchnorm",
    "fuse_batchnorm_",
    "load",
    "plan",
    "profile",
    "reestimate_batchnorm_",
    "save",
    "stages",
    "tabulate",
]

if TYPE_CHECKING:
    from tenfold.allocation import choose
    from tenfold.calibration import calibrate
    from tenfold.checkpoint import load, save
    from tenfold.decompositions import Fit, decompose
    from tenfold.errors import TenfoldError
    from tenfold.exporting.export import export
    from tenfold.iterative import Schedule, Training, compress_iteratively, stages
    from tenfold.parallel import Workers
    from tenfold.pipeline import Compressed, compress
    from tenfold.planning import Score, Sensitivity
    from tenfold.planning.plan import plan
    from tenfold.planning.tabulate import tabulate
    from tenfold.profiling.compare_outputs import agreement
    from tenfold.profiling.latency.measure import compare_latency
    from tenfold.profiling.profile import profile
    from tenfold.progress import Event
    from tenfold.records import (
        Budget,
        Calibration,
        ExportRecord,
        LayerSpec,
        Metric,
        OptionTable,
        Plan,
        Profile,
        Recipe,
        RunRecord,
    )
    from tenfold.runtime import Runtime
    from tenfold.surgery import apply, apply_, densify, densify_, fuse_batchnorm, fuse_batchnorm_, reestimate_batchnorm_
    from tenfold.tasks import Task
    from tenfold.training import Distillation, TuneConfig
    from tenfold.training.finetune import finetune


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that ``import tenfold`` costs next to nothing."""
    if name not in _HOMES:
        msg = f"module 'tenfold' has no attribute {name!r}"
        raise AttributeError(msg)
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List what is public, and nothing that is only there because it was imported."""
    return sorted({*(name for name in globals() if name.startswith("__") and name.endswith("__")), *__all__})
