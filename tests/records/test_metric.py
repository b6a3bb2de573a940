"""What a score is: its name, unit and direction, in words."""

from __future__ import annotations

import json

import pytest

from tenfold.records import Metric, RunRecord, SensitivityTable
from tenfold.records.metric import FRACTION
from tests.reporting.runs import record

MAP = Metric(name="mAP", unit="%")
LOSS = Metric(name="loss", better="lower")
PSNR = Metric(name="PSNR", unit="dB")


@pytest.mark.parametrize(
    ("metric", "value", "text", "label"),
    [
        (FRACTION, 0.9339, "93.39 %", "score (%)"),
        (MAP, 37.26, "37.26 %", "mAP (%)"),
        (LOSS, 0.0123456, "0.01235", "loss"),
        (LOSS, 7.9123, "7.912", "loss"),
        (LOSS, 34_567.8, "34,568", "loss"),
        (LOSS, float("inf"), "+inf", "loss"),
        (LOSS, float("nan"), "not a number", "loss"),
        (PSNR, 31.456, "31.46 dB", "PSNR (dB)"),
    ],
)
def test_values_are_shown_in_their_unit(metric: Metric, value: float, text: str, label: str) -> None:
    assert (metric.text(value), metric.label) == (text, label)


@pytest.mark.parametrize(
    ("metric", "before", "after", "change", "lost"),
    [
        (FRACTION, 0.9339, 0.9283, "−0.56 points", 0.0056),
        (FRACTION, 0.5, 0.5, "±0.00 points", 0.0),
        (MAP, 37.5, 38.0, "+0.50 points", -0.5),
        (LOSS, 0.35, 0.41, "+0.06", 0.06),
        (LOSS, 0.35, float("nan"), "—", None),
        (PSNR, 31.5, 31.2, "−0.3 dB", 0.3),
    ],
)
def test_changes_have_a_sign_and_losses_a_direction(
    metric: Metric, before: float, after: float, change: str, lost: float | None
) -> None:
    assert metric.change(before, after) == change
    if lost is not None:
        assert metric.lost(before, after) == pytest.approx(lost)


def test_records_from_before_there_were_metrics_hold_fractions() -> None:
    values = json.loads(record().to_json())
    assert values.pop("metric")["name"] == "score"
    assert RunRecord.model_validate(values).metric == FRACTION
    own = record().replace(metric=PSNR)
    assert RunRecord.from_text(own.to_json()).metric == PSNR
    assert SensitivityTable.model_fields["metric"].default == FRACTION
