"""The objects that flow between the verbs: frozen, strict, printable, and free of torch."""

from tenfold.records.analysis import Analysis, CurvePoint, LayerAnalysis, Spectrum
from tenfold.records.base import Record, explain, held_alone, read_json, write_text, written_whole
from tenfold.records.candidates import Candidates, ForwardTime, LayerCandidates, Merged, Options
from tenfold.records.costs import Call, Cost, Environment, Latency, LayerProfile, Profile, Speedup
from tenfold.records.exports import ExportRecord, Int8Record
from tenfold.records.gather import TrainShape, TTGatherSpec
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
    "chain_macs",
    "chain_params",
    "explain",
    "held_alone",
    "read_json",
    "write_text",
    "written_whole",
]
