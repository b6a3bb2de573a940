"""Tables: the right numbers, every layer accounted for, nothing wider than the page."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from tenfold.records import (
    Cost,
    Environment,
    Latency,
    LayerPlan,
    LayerProfile,
    LayerSpec,
    Measurement,
    Plan,
    Profile,
    Recipe,
    RunRecord,
    Speedup,
)
from tenfold.reporting import as_text, render_plan, render_profile, render_record

ENVIRONMENT = Environment(tenfold="0.1", python="3.11", torch="2.6", device="cpu", threads=2, platform="Linux")
BATCH_NORM = "BatchNorm2d is not a layer that tenfold factorizes"


def convolution(i: int, **changes: Any) -> LayerPlan:
    values = {
        "path": f"layer1.{i}.conv1",
        "kind": "Conv2d 64→64 3×3",
        "action": "factorize",
        "format": "tucker2",
        "rank": {"out": 24, "in": 20},
        "reason": "at most 48.0% of the layer's macs",
        "before": Cost(params=36864, macs=37_748_736),
        "after": Cost(params=7136, macs=7_307_264),
        "rel_error": 0.4321,
    }
    return LayerPlan(**values | changes)


def batch_norm(i: int) -> LayerPlan:
    cost = Cost(params=128)
    return LayerPlan(
        path=f"layer1.{i}.bn1", kind="BatchNorm2d", action="keep", reason=BATCH_NORM, before=cost, after=cost
    )


def plan(layers: tuple[LayerPlan, ...]) -> Plan:
    before, after = sum((x.before for x in layers), Cost()), sum((x.after for x in layers), Cost())
    return Plan(tenfold="0.1", model="Net", recipe=Recipe(rule="ratio"), before=before, after=after, layers=layers)


def latency(ms: float) -> Latency:
    return Latency(
        median_ms=ms, low_ms=ms - 0.5, high_ms=ms + 0.5, runs=40, batch_size=8, threads=2, device="cpu", dtype="float32"
    )


def record(**changes: Any) -> RunRecord:
    values = {
        "task": "cifar10:resnet56",
        "before": Measurement(params=853_018, macs=126_480_000, bytes=3_500_000, score=0.9339),
        "after": Measurement(params=430_000, macs=63_240_000, bytes=1_750_000, score=0.9283),
        "plan": plan((convolution(0), batch_norm(0))),
        "seconds": {"plan": 1.0, "tune": 74.0},
        "environment": ENVIRONMENT,
    }
    return RunRecord(**values | changes)


def line(text: str, start: str) -> str:
    """Return the one line that starts like this."""
    (found,) = (x for x in text.splitlines() if x.strip().startswith(start))
    return found


def test_before_and_after_in_human_numbers() -> None:
    text = render_record(record())
    assert "cifar10:resnet56" in text
    for start, words in {
        "parameters": ("853.0 k", "430.0 k", "2.0× fewer"),
        "MACs ": ("126.5 M", "63.2 M", "2.0× fewer"),
        "size": ("3.3 MiB", "1.7 MiB"),
        "score": ("93.39 %", "92.83 %", "−0.56 points"),
    }.items():
        for word in words:
            assert word in line(text, start)
    assert "latency" not in text
    assert "1 min 15 s in all" in text


def test_latency_has_its_spread_and_its_conditions() -> None:
    before = record().before.replace(latency_ms=8.0, latency=latency(8))
    after = record().after.replace(latency_ms=4.0, latency=latency(4))
    text = render_record(record(before=before, after=after))
    assert "8.00 ms [7.50–8.50]" in line(text, "latency")
    assert "2.00× faster" in line(text, "latency")
    assert "median of 40 interleaved rounds [quartiles], batch 8, float32, contiguous, 2 threads" in line(
        text, "Latency:"
    )
    speedup = Speedup(ratio=0.8, low=0.7, high=0.9, rounds=40)
    assert "0.80× as fast [0.70–0.90×]" in render_record(record(before=before, after=after, speedup=speedup))


def test_scores_on_the_way_have_a_line_each() -> None:
    text = render_record(record(scores={"original": 0.9339, "compressed": 0.3, "tuned": 0.9283}))
    assert "30.00 %" in line(text, "score, compressed")
    assert "−63.39 points" in line(text, "score, compressed")
    assert "92.83 %" in line(text, "score, tuned")


def test_a_score_that_was_not_measured_is_not_shown() -> None:
    text = render_record(record(before=Measurement(params=2, macs=2), after=Measurement(params=1, macs=1)))
    assert "score" not in text


@pytest.mark.parametrize("width", [80, 100, 120])
def test_a_long_plan_is_short_and_fits(width: int) -> None:
    layers = tuple(layer for i in range(100) for layer in (convolution(i), batch_norm(i)))
    text = render_plan(plan(layers), width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "100 × BatchNorm2d" in text
    assert "12.8 k" in line(text, "layer1.0.bn1")  # all of them together
    assert "98" in text
    assert text.count("conv1") == 100
    assert text.count("at most 48.0%") == 1  # a reason that all share is said once


def test_differing_reasons_stand_beside_their_layers() -> None:
    layers = (convolution(0), convolution(1, reason="rank given for 'layer1.1.*'"), batch_norm(0))
    text = render_plan(plan(layers), width=140)
    assert "at most 48.0%" in line(text, "layer1.0.conv1")
    assert "rank given for" in line(text, "layer1.1.conv1")
    assert "tucker2 out=24 in=20" in line(text, "layer1.0.conv1")
    assert "36.9 → 7.1 k" in line(text, "layer1.0.conv1")
    assert "0.432" in line(text, "layer1.0.conv1")


def test_a_kept_layer_has_its_own_reason() -> None:
    kept = convolution(3, action="keep", format=None, rank=None, reason="kept as asked by '*.3.*'", rel_error=None)
    text = render_plan(plan((convolution(0), kept, batch_norm(0), batch_norm(1))))
    assert "kept as asked by '*.3.*'" in line(text, "layer1.3.conv1")
    assert "Kept: 3 layers" in text
    assert "2 × BatchNorm2d" in text


def test_brackets_in_names_are_no_markup() -> None:
    text = render_plan(plan((convolution(0, path="[bold]x[/bold]"), convolution(1))))
    assert "[bold]x[/bold]" in text


def profile(**changes: Any) -> Profile:
    norm = LayerProfile(path="bn", kind="BatchNorm2d", note=BATCH_NORM, params=16, bytes=64, macs=0)
    spec = LayerSpec(kind="conv", in_channels=3, out_channels=8, kernel=(3, 3))
    layers = (
        LayerProfile(path="conv", kind="Conv2d", spec=spec, params=216, bytes=864, macs=7776, activation_bytes=1152),
        *(norm.replace(path=f"bn{i}") for i in range(9)),
        LayerProfile(path="relu", kind="ReLU", params=0, bytes=0, macs=0),
    )
    values = {"model": "Net", "params": 360, "bytes": 1440, "macs": 10_000, "input_shapes": ((1, 3, 8, 8),)}
    return Profile(**values | {"layers": layers, "other_macs": 2224, "environment": ENVIRONMENT} | changes)


@pytest.mark.parametrize("width", [80, 120])
def test_profile_accounts_for_every_mac(width: int) -> None:
    text = render_profile(profile(), width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "360 parameters" in text
    assert "1×3×8×8" in text
    assert "77.8 %" in line(text, "conv")
    assert "22.2 %" in line(text, "(no layer)")
    assert "9 × BatchNorm2d" in text or width == 80  # broken over two lines there
    assert "ReLU" not in text


def test_profile_tells_what_it_could_not_count_and_what_it_measured() -> None:
    text = render_profile(profile(uncounted={"aten::fancy": 3}, latency=latency(4)))
    assert "aten::fancy (3 calls)" in text
    assert "4.00 ms [3.50–4.50]" in text


def test_text_has_no_colour_and_no_trailing_blanks() -> None:
    text = as_text("[red]plain[/red]")
    assert text == "[red]plain[/red]"
    rendered = render_record(record())
    assert "\x1b" not in rendered
    assert all(x == x.rstrip() for x in rendered.splitlines())


def test_needs_no_torch() -> None:
    """Reports are made from records alone."""
    code = "import sys, tenfold.reporting; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_factor_is_printed_where_none_can_be_claimed() -> None:
    busy = "4 other processes were busy"
    loaded = latency(4).replace(load=busy)
    before = record().before.replace(latency_ms=8.0, latency=latency(8).replace(load=busy))
    after = record().after.replace(latency_ms=4.0, latency=loaded)
    wide = Speedup(ratio=120, low=0.1, high=900, rounds=5, doubt=busy)
    text = render_record(record(before=before, after=after, speedup=wide))
    assert line(text, "latency").endswith("not measured")
    assert "120" not in text
    assert f"{busy}; no speed-up can be claimed." in " ".join(text.split())
    some = wide.replace(low=1.2, high=2.9, doubt="the rounds differ too much")
    text = render_record(record(before=before, after=after, speedup=some))
    assert line(text, "latency").endswith("between 1.2 and 2.9 times")
    assert "no speed-up can be claimed: the rounds differ too much." in " ".join(text.split())
    by_processor = after.replace(latency=loaded.replace(clock="processor"))
    text = render_record(record(before=before, after=by_processor, speedup=wide.replace(doubt="", low=110, high=130)))
    assert "120.00× faster [110.00–130.00×]" in line(text, "latency")
    assert f"by processor time; {busy}; speed-up with its 95 % interval." in " ".join(text.split())
