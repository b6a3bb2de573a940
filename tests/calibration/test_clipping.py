"""Gradients within bounds: one odd token does not say alone what matters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tenfold.calibration.clipping import clipped
from tenfold.calibration.gradients import GradientSums
from tenfold.records import LayerSpec

TOKENS, WIDTH, SAMPLES = 8, 6, 3


class Odd(nn.Module):
    """The first token of each sample counts a thousand times, and by the first channel alone; others by the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.ones(TOKENS, WIDTH)
        weight[1:, 0], weight[0] = 0.0, 0.0
        weight[0, 0] = 1000.0
        return self.layer(x) * weight


def gram(clip: float | None) -> Tensor:
    torch.manual_seed(0)
    model = Odd()
    spec = LayerSpec(kind="linear", in_channels=4, out_channels=WIDTH, bias=True)
    with GradientSums(model, {"layer": spec}, seed=1) as sums:
        sums.clip = clip
        for _ in range(20):
            sums.add(model, torch.randn(SAMPLES, TOKENS, 4))
    found = sums.mean()["layer"]
    assert isinstance(found, Tensor)
    return found[0]


def test_an_odd_token_counts_no_more_than_its_bound() -> None:
    plain, bounded = gram(None), gram(2.0)
    others = slice(1, None)
    assert float(plain[0, 0]) > 1e4 * float(plain[others, others].diagonal().sum())
    # Its norm is at most twice the mean, those of the others at least half of it: so the squares are at most 16 to 1.
    assert float(bounded[0, 0]) <= 16 / (TOKENS - 1) * float(bounded[others, others].diagonal().sum()) * (1 + 1e-6)


def test_norms_are_those_of_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 3, 4, 5, generator=generator) * torch.logspace(-3, 3, 20).view(1, 1, 4, 5)
    rows[:, :, 1, 2] = 0.0
    found = clipped(rows, 4, 3.0)
    for sample in range(4):
        norms = [float(rows[:, :, sample, t].norm()) for t in range(5)]
        mean = sum(norms) / sum(n > 0 for n in norms)
        for t, norm in enumerate(norms):
            wanted = rows[:, :, sample, t] * (min(max(norm, mean / 3), 3 * mean) / norm if norm else 1)
            torch.testing.assert_close(found[:, :, sample, t], wanted)


def test_positions_folded_into_the_first_axis_are_of_their_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, 3, 4, 5, generator=generator) * torch.logspace(-2, 2, 20).view(1, 1, 4, 5)
    folded = rows.reshape(1, 3, 20, 1)
    torch.testing.assert_close(clipped(folded, 4, 2.0).view_as(rows), clipped(rows, 4, 2.0))
    torch.testing.assert_close(clipped(rows, 3, 2.0), clipped(rows, 4, 2.0))
