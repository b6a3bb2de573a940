"""The bar shows where training is, on a terminal and nowhere else."""

from __future__ import annotations

import io

import torch
from rich.console import Console
from torch import nn

from tenfold.training import RichProgress, TuneConfig, finetune

BATCHES = [(torch.randn(4, 2), torch.tensor([0, 1, 0, 1]))] * 3


def drawn(*, terminal: bool) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=120)
    finetune(nn.Linear(2, 2), BATCHES, TuneConfig(epochs=2), evaluate=lambda _: 0.25, progress=RichProgress(console))
    return text.getvalue()


def test_terminal_sees_epoch_score_and_completion() -> None:
    text = drawn(terminal=True)
    assert "tune 2/2" in text
    assert "score 0.2500" in text
    assert "100%" in text


def test_elsewhere_it_is_silent() -> None:
    assert drawn(terminal=False) == ""
