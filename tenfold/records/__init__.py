"""The objects that flow between the verbs: frozen, strict, printable, and free of torch."""

from tenfold.records.base import Record, explain, read_json, write_text
from tenfold.records.costs import Call, Cost, Environment, Latency, LayerProfile, Profile, Speedup
from tenfold.records.geometry import ContractSpec, LayerSpec, Shape, StageSpec, chain_macs, chain_params
from tenfold.records.plans import Budget, LayerPlan, Measurement, Plan, RunRecord

__all__ = [
    "Budget",
    "Call",
    "ContractSpec",
    "Cost",
    "Environment",
    "Latency",
    "LayerPlan",
    "LayerProfile",
    "LayerSpec",
    "Measurement",
    "Plan",
    "Profile",
    "Record",
    "RunRecord",
    "Shape",
    "Speedup",
    "StageSpec",
    "chain_macs",
    "chain_params",
    "explain",
    "read_json",
    "write_text",
]
