"""The objects that flow between the verbs: frozen, strict, printable, and free of torch."""

from tenfold.files import atomic_write, locked, write_text
from tenfold.records.agreement import Agreement
from tenfold.records.analysis import Analysis, CurvePoint, LayerAnalysis, Spectrum
from tenfold.records.base import Names, Patterns, Record, Seed, explain
from tenfold.records.budget import Budget
from tenfold.records.chains import (
    FoldSpec,
    ReorderSpec,
    SharedSliceSpec,
    SubLayerSpec,
    chain_buffer_bytes,
    chain_macs,
    chain_params,
)
from tenfold.records.costs import Call, Clock, Cost, Environment, Latency, LayerProfile, Profile, Speedup
from tenfold.records.geometry import ContractSpec, LayerSpec, Shape
from tenfold.records.introduced import Introduced
from tenfold.records.metric import Metric
from tenfold.records.options import FormatOptions, ForwardTime, LayerOptions, OptionTable, UnitOptions
from tenfold.records.plans import LayerPlan, Plan, UnitPlan
from tenfold.records.recipe import DEFAULT_FORMATS, Calibration, Recipe
from tenfold.records.runs import ExportRecord, Int8Record, Measurement, RunRecord, StageLayer, StageRecord
from tenfold.records.sensitivity_table import (
    LayerSensitivity,
    SensitivityKey,
    SensitivityPoint,
    SensitivityTable,
    TradeOff,
    TradeOffPoint,
)
from tenfold.records.sizes import parse_size
from tenfold.records.store import JsonCache
from tenfold.records.train_shape import TrainShape, TTGatherSpec
from tenfold.records.tuning import EpochRecord, TuneConfig, TuneResult
from tenfold.records.units import Unit

__all__ = [
    "DEFAULT_FORMATS",
    "Agreement",
    "Analysis",
    "Budget",
    "Calibration",
    "Call",
    "Clock",
    "ContractSpec",
    "Cost",
    "CurvePoint",
    "Environment",
    "EpochRecord",
    "ExportRecord",
    "FoldSpec",
    "FormatOptions",
    "ForwardTime",
    "Int8Record",
    "Introduced",
    "JsonCache",
    "Latency",
    "LayerAnalysis",
    "LayerOptions",
    "LayerPlan",
    "LayerProfile",
    "LayerSensitivity",
    "LayerSpec",
    "Measurement",
    "Metric",
    "Names",
    "OptionTable",
    "Patterns",
    "Plan",
    "Profile",
    "Recipe",
    "Record",
    "ReorderSpec",
    "RunRecord",
    "Seed",
    "SensitivityKey",
    "SensitivityPoint",
    "SensitivityTable",
    "Shape",
    "SharedSliceSpec",
    "Spectrum",
    "Speedup",
    "StageLayer",
    "StageRecord",
    "SubLayerSpec",
    "TTGatherSpec",
    "TradeOff",
    "TradeOffPoint",
    "TrainShape",
    "TuneConfig",
    "TuneResult",
    "Unit",
    "UnitOptions",
    "UnitPlan",
    "atomic_write",
    "chain_buffer_bytes",
    "chain_macs",
    "chain_params",
    "explain",
    "locked",
    "parse_size",
    "write_text",
]
