"""The objects that flow between the verbs: frozen, strict, printable, and free of torch."""

from tenfold.records.analysis import Analysis, CurvePoint, LayerAnalysis, Spectrum
from tenfold.records.base import Record, explain
from tenfold.records.candidates import Candidates, ForwardTime, LayerCandidates, Merged, Options
from tenfold.records.costs import Call, Cost, Environment, Latency, LayerProfile, Profile, Speedup
from tenfold.records.exports import ExportRecord, Int8Record
from tenfold.records.geometry import (
    ContractSpec,
    LayerSpec,
    Shape,
    SharedSliceSpec,
    SubLayerSpec,
    chain_macs,
    chain_params,
)
from tenfold.records.plans import Budget, LayerPlan, Measurement, Plan, RunRecord
from tenfold.records.sensitivity import (
    LayerSensitivity,
    SensitivityKey,
    SensitivityPoint,
    SensitivityTable,
    TradeOff,
    TradeOffPoint,
)
from tenfold.records.stages import StageLayer, StageRecord
from tenfold.records.store import JsonCache, atomic_write, locked, read_json, write_text
from tenfold.records.train_shape import TrainShape, TTGatherSpec

__all__ = [
    "Analysis",
    "Budget",
    "Call",
    "Candidates",
    "ContractSpec",
    "Cost",
    "CurvePoint",
    "Environment",
    "ExportRecord",
    "ForwardTime",
    "Int8Record",
    "JsonCache",
    "Latency",
    "LayerAnalysis",
    "LayerCandidates",
    "LayerPlan",
    "LayerProfile",
    "LayerSensitivity",
    "LayerSpec",
    "Measurement",
    "Merged",
    "Options",
    "Plan",
    "Profile",
    "Record",
    "RunRecord",
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
    "atomic_write",
    "chain_macs",
    "chain_params",
    "explain",
    "locked",
    "read_json",
    "write_text",
]
