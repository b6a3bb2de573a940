"""Parts of batches: where a batch may be split, and that the statistics are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tenfold.calibration import calibrate, micro_batches
from tenfold.calibration.collect import measurable
from tenfold.calibration.gradients import GradientSums
from tenfold.calibration.micro_batches import Split, alive_in, parts_of
from tenfold.tracing.inputs import call_model, tensors_in
from tenfold.tracing.replay import Replay


class Masked(nn.Module):
    """A model of sequences with a mask of real tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.out = nn.Embedding(30, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(self.embed(ids))) * attention_mask[..., None])


def images() -> tuple[nn.Module, list[Any]]:
    conv = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(576, 3))
    return conv, [torch.randn(7, 3, 16, 16), torch.randn(4, 3, 16, 16)]


def tokens() -> tuple[nn.Module, list[Any]]:
    mask = torch.arange(6) < torch.randint(1, 7, (9, 1))
    return Masked(), [{"ids": torch.randint(0, 30, (9, 6)), "attention_mask": mask.long()}]


class First(nn.Module):
    """A recurrent network over the first axis."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.rnn = nn.Linear(4, 6), nn.GRU(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(self.inner(x))[0]


class Centred(nn.Module):
    """A model whose samples see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return y - y.mean(0)


def split(model: nn.Module, batch: Any) -> Split:
    with GradientSums(model, measurable(model)) as sums:
        sums.split_like(batch)
        return sums.split


@pytest.mark.filterwarnings("ignore:.*saw fewer rows:tenfold.errors.CalibrationWarning")
@pytest.mark.parametrize("case", [images, tokens])
def test_parts_of_batches_have_the_statistics_of_the_whole(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = case()
    model.eval()
    wanted = calibrate(model, batches)
    whole = split(model, batches[0])
    assert whole.rows is None
    monkeypatch.setattr(micro_batches, "PART_BYTES", whole.held // 2)
    parts = split(model, batches[0])
    assert parts.rows == len(next(tensors_in(batches[0]))) // 2
    assert parts.held <= whole.held / 2
    found = calibrate(model, batches)
    for path, own in wanted.items():
        assert found[path].count == own.count
        assert isinstance(own.output_gram, Tensor)
        torch.testing.assert_close(found[path].output_gram, own.output_gram, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[path].mean, own.mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", [First(), Centred()], ids=["recurrent", "centred"])
def test_batches_whose_rows_depend_on_each_other_stay_whole(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_batches, "PART_BYTES", 1)
    found = split(model.eval(), torch.randn(12, 3, 4))
    assert found.rows is None
    assert found.held > 0 < found.alive


def test_batches_without_a_common_axis_stay_whole() -> None:
    for batch in (
        (torch.ones(4, 2), torch.ones(3)),
        {"x": torch.ones(4, 2), "scale": torch.tensor(2.0)},
        [torch.ones(4)],
    ):
        assert list(parts_of(batch, 2)) == [batch]


@pytest.mark.parametrize("depth", [3, 12])
def test_what_something_still_reads_does_not_grow_with_depth_and_is_what_a_replay_holds(depth: int) -> None:
    convolutions = [nn.Conv2d(4, 4, 3, padding=1) for _ in range(depth)]
    chain = nn.Sequential(*(layer for own in convolutions for layer in (own, nn.ReLU()))).eval()
    one = 4 * 4 * 64  # bytes of an output
    batches = [torch.randn(5, 4, 8, 8) for _ in range(8)]
    alive = alive_in(chain, batches[0][:1], call_model)
    assert alive == 2 * one  # what a layer reads, and what it puts out
    replay, most = Replay(chain, batches, changing=False), 0
    for path in replay.order:
        for _ in (*replay.inputs(path), *replay.outputs(path)):
            most = max(most, replay._bytes)
    assert one * 40 <= most <= 40 * alive


def test_a_shortcut_is_alive_until_it_is_added() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.inner, self.last = (nn.Linear(6, 6) for _ in range(3))
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            x = self.start(x)
            return x + self.last(self.relu(self.inner(x)))

    assert (
        alive_in(Residual(), torch.randn(1, 6), call_model) == 3 * 24
    )  # with what a layer reads, and what it puts out
