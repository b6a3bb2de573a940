"""tenfold bench: its shape and its errors; no test looks at what it measures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tenfold.profiling import Comparison
from tenfold.records import Latency, Speedup

Run = Callable[..., Any]
QUICK = ("--seconds", "0.1")


@pytest.fixture
def checkpoint(tenfold: Run, tiny: str) -> Path:
    args = ("--budget", "macs=0.5", "--no-latency", "--no-tune", "--no-eval", "--out", "out")
    assert tenfold("compress", "--task", tiny, *args).code == 0
    return Path("out")


def test_two_models_are_compared(tenfold: Run, tiny: str, checkpoint: Path, weights: Callable[..., Path]) -> None:
    found = tenfold("bench", weights(), checkpoint, "--task", tiny, "--batch-size", "3", *QUICK, "--json").json
    assert found["a"]["params"] > found["b"]["params"]
    assert [found[name]["latency"]["batch_size"] for name in "ab"] == [3, 3]
    speedup = found["speedup"]
    assert speedup["low"] <= speedup["ratio"] <= speedup["high"]
    assert found["faster"] is (None if speedup["low"] <= 1 <= speedup["high"] else speedup["ratio"] > 1)
    assert found["environment"]["torch"]


def test_people_see_a_table_and_a_verdict(tenfold: Run, tiny: str, checkpoint: Path) -> None:
    outcome = tenfold("bench", "dense", checkpoint, "--task", tiny, *QUICK)
    assert outcome.code == 0, outcome.err
    assert "times faster" in outcome.out
    assert "rounds in turns" in outcome.out


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_memory_format_can_be_chosen(tenfold: Run, tiny: str, layout: str) -> None:
    outcome = tenfold("bench", "dense", "dense", "--task", tiny, "--memory-format", layout, *QUICK, "--json")
    assert outcome.json["a"]["latency"]["memory_format"] == "contiguous"  # there are no images here
    assert outcome.json["a"]["params"] == outcome.json["b"]["params"]


def test_what_is_no_model_is_refused(tenfold: Run, tiny: str) -> None:
    assert tenfold("bench", "dense", "nowhere", "--task", tiny).is_error("no model 'nowhere'", code=2)
    assert tenfold("bench", "dense", "none.safetensors", "--task", tiny).is_error("none.safetensors")


def test_a_checkpoint_does_not_run_code_that_it_names(tenfold: Run, checkpoint: Path) -> None:
    assert tenfold("bench", checkpoint, "dense").is_error("Give --task")


def test_what_cannot_be_claimed_is_not_said(
    tenfold: Run, tiny: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare(variants: dict[str, Any], *, seconds: float) -> Comparison:
        busy = "4 other processes were busy"
        time = {"low_ms": 1, "high_ms": 3, "runs": 5, "threads": 2, "device": "cpu", "dtype": "float32", "load": busy}
        wide = Speedup(ratio=120, low=0.1, high=900, rounds=5, doubt=busy)
        return Comparison({n: Latency(median_ms=2, **time) for n in variants}, dict.fromkeys(variants, wide))

    monkeypatch.setattr("tenfold.profiling.compare_latency", compare)
    outcome = tenfold("bench", "dense", checkpoint, "--task", tiny, "--memory-format", "contiguous", *QUICK)
    assert "Not measured: 4 other processes were busy (" in " ".join(outcome.out.split())
    assert "120" not in outcome.out
    again = tenfold("bench", "dense", checkpoint, "--task", tiny, "--memory-format", "contiguous", *QUICK, "--json")
    assert again.json["faster"] is None
