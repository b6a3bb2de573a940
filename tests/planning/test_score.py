"""What evaluate may return, and what it is told where that is no score."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tenfold.errors import DataError
from tenfold.planning import Score, Sensitivity
from tenfold.records import Metric
from tenfold.records.metric import FRACTION
from tests.planning.fakes import costs, net

PPL = Metric(name="perplexity", better="lower")
NET = nn.Identity()


@pytest.mark.parametrize(
    "found", [0.5, np.float32(0.5), np.array([0.5]), torch.tensor(0.5), torch.tensor([0.5]), Decimal("0.5")]
)
def test_one_number_of_any_kind_is_a_score(found: Any) -> None:
    value = Score(lambda _: found)(NET)
    assert (type(value), value) == (float, 0.5)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (None, "evaluate returned None: .* one number"),
        ((0.93, 0.2), "a tuple of 2"),
        ({"accuracy": 0.93}, "a dict of 1"),
        (torch.zeros(3), r"a Tensor \(3,\)"),
        ("93 %", "a str"),
    ],
)
def test_what_is_no_number_is_refused(found: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        Score(lambda _: found)(NET)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (
            93.4,
            r"returned 93\.4, and a score is a fraction .*return 0\.934, or say what it is: .*metric=tenfold\.Metric",
        ),
        (1234.5, "say what it is"),
        (-0.3, "with better='lower' for a loss"),
        (float("nan"), "returned nan for the model as it is"),
        (float("inf"), "a finite number"),
    ],
)
def test_the_original_has_the_score_that_was_declared(found: float, words: str) -> None:
    with pytest.raises(DataError, match=words):
        Score(lambda _: found).of_original(NET)
    model = net()
    with pytest.raises(DataError, match=words):
        _ = Sensitivity(model, costs(model), evaluate=lambda _: found).baseline
    if np.isfinite(found):
        assert Score(lambda _: found, metric=PPL).of_original(NET) == found
        assert Score(lambda _: found)(NET) == found  # of a compressed model it is what it is


def test_a_function_may_carry_its_metric() -> None:
    def evaluate(_: nn.Module) -> float:
        return 7.9

    assert Score.of(evaluate).metric == FRACTION
    evaluate.metric = PPL  # type: ignore[attr-defined]
    assert Score.of(evaluate).metric == PPL
    score = Score(evaluate, metric=PPL)
    assert Score.of(score) is score


def test_a_table_of_another_metric_is_refused(tmp_path: Any) -> None:
    model, file = net(), tmp_path / "table.json"
    first = Sensitivity(model, costs(model), evaluate=Score(lambda _: 5.0, metric=PPL), path=file)
    assert first.baseline == 5.0
    with pytest.raises(DataError, match=r"other conditions: metric \(perplexity, now PSNR \(dB\)\)"):
        Sensitivity(
            model, costs(model), evaluate=Score(lambda _: 5.0, metric=Metric(name="PSNR", unit="dB")), path=file
        )
    assert Sensitivity(model, costs(model), path=file).table.metric == PPL
