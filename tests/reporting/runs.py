"""Records to report on, made up, of any size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tenfold.records import (
    Analysis,
    Cost,
    CurvePoint,
    Environment,
    Latency,
    LayerAnalysis,
    LayerPlan,
    Measurement,
    Plan,
    Recipe,
    RunRecord,
    Spectrum,
    Speedup,
    StageLayer,
    StageRecord,
    write_text,
)

ENVIRONMENT = Environment(tenfold="0.1", python="3.11", torch="2.6", device="cpu", threads=2, platform="Linux")


def layer(i: int) -> LayerPlan:
    """Return the plan of layer ``i``: every third is a batch norm that is kept."""
    if i % 3 == 2:
        cost = Cost(params=128)
        values: dict[str, Any] = {"path": f"layer{i}.bn", "kind": "BatchNorm2d", "action": "keep", "before": cost}
        return LayerPlan(**values, after=cost, reason="BatchNorm2d is not a layer that tenfold factorizes")
    return LayerPlan(
        path=f"layer{i}.conv",
        kind="Conv2d 64→64 3×3",
        action="factorize",
        format="tucker2",
        rank={"out": 24 + i % 8, "in": 20},
        reason="best for the whole model; sensitivity 3.5, largest term 1.25",
        before=Cost(params=36864, macs=37_748_736 - 1000 * i),
        after=Cost(params=7136, macs=7_307_264 + 500 * (i * 7 % 11)),
        rel_error=0.3 + 0.01 * (i * 5 % 13),
        latency_before_ms=1.5,
        latency_after_ms=0.5,
    )


def record(layers: int = 6, **changes: Any) -> RunRecord:
    """Return the record of a run in two stages."""
    plans = tuple(layer(i) for i in range(layers))
    before, after = sum((x.before for x in plans), Cost()), sum((x.after for x in plans), Cost())
    plan = Plan(tenfold="0.1", model="Net", recipe=Recipe.of("macs=0.3"), before=before, after=after, layers=plans)
    epochs = tuple({"epoch": i + 1, "loss": 1.0 / (i + 1), "lr": 0.1, "score": None, "seconds": 1.0} for i in range(2))
    changed = {"layer0.conv": StageLayer(format="tucker2", rank={"out": 24, "in": 20})}
    stages = tuple(
        StageRecord(
            index=i,
            round=i,
            before=before,
            after=after,
            layers=changed,
            scores={"compressed": 0.85 + 0.01 * i, "tuned": 0.9},
            tuning=epochs,
        )
        for i in (1, 2)
    )
    times = [
        Latency(
            median_ms=ms, low_ms=ms - 0.1, high_ms=ms + 0.1, runs=9, batch_size=8, threads=2, device="cpu", dtype="f32"
        )
        for ms in (10.0, 5.0)
    ]
    values: dict[str, Any] = {
        "task": "</script><b>net",  # names are text, whatever is in them
        "command": "tenfold stages --budget macs=0.3",
        "before": Measurement(**before.model_dump(), bytes=10**7, latency_ms=10.0, latency=times[0], score=0.92),
        "after": Measurement(**after.model_dump(), bytes=10**6, latency_ms=5.0, latency=times[1], score=0.9),
        "speedup": Speedup(ratio=2.0, low=1.9, high=2.1, rounds=9),
        "scores": {"original": 0.92, "compressed": 0.87, "tuned": 0.9},
        "plan": plan,
        "stages": stages,
        "settings": {"calibration": 200, "tuning": {"epochs": 2, "seed": 0, "clip": None}},
        "environment": ENVIRONMENT,
    }
    return RunRecord(**values | changes)


def analysis(plan: Plan) -> Analysis:
    """Return as much for every factorized layer as ``analyse`` returns at most."""
    spectrum = Spectrum(index=tuple(range(1, 49)), values=tuple(0.9**i for i in range(48)))
    curve = tuple(
        CurvePoint(rank={"out": i, "in": i}, cost=Cost(params=1500 * i, macs=1_500_000 * i), error=1 - i / 25)
        for i in range(1, 25)
    )
    layers = tuple(
        LayerAnalysis(path=x.path, format="tucker2", spectra={"out": spectrum, "in": spectrum}, curve=curve)
        for x in plan.factorized
    )
    return Analysis(tenfold="0.1", layers=layers)


def write(folder: Path, layers: int = 6, **changes: Any) -> Path:
    """Write a run to a folder, without weights, and return the folder."""
    made = record(layers, **changes)
    write_text(folder / "record.json", made.to_json())
    write_text(folder / "analysis.json", analysis(made.plan).model_dump_json())
    return folder
