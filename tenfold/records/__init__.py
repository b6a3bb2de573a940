"""The objects that flow between the verbs: frozen, strict, printable, and free of torch."""

from tenfold.records.base import Record, explain, read_json, write_text
from tenfold.records.costs import Call, Cost, Environment, Latency, LayerProfile, Profile, Speedup
from tenfold.records.gather import GatherSpec, TrainShape
from tenfold.records.geometry import ContractSpec, FoldedSpec, LayerSpec, Shape, StageSpec, chain_macs, chain_params
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
    "Budget",
    "Call",
    "ContractSpec",
    "Cost",
    "Environment",
    "FoldedSpec",
    "GatherSpec",
    "Latency",
    "LayerPlan",
    "LayerProfile",
    "LayerSensitivity",
    "LayerSpec",
    "Measurement",
    "Plan",
    "Profile",
    "Record",
    "RunRecord",
    "SensitivityKey",
    "SensitivityPoint",
    "SensitivityTable",
    "Shape",
    "Speedup",
    "StageLayer",
    "StageRecord",
    "StageSpec",
    "TradeOff",
    "TradeOffPoint",
    "TrainShape",
    "chain_macs",
    "chain_params",
    "explain",
    "read_json",
    "write_text",
]
