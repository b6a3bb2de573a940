"""Agreement of two models on unlabeled inputs, against what can be said by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tenfold
from tenfold.errors import AgreementWarning, DataError, TenfoldWarning
from tenfold.profiling import agreement
from tenfold.records import Agreement, RunRecord
from tenfold.runtime import Runtime

QUIET = Runtime(measure=False)


class Fixed(nn.Module):
    """Returns what its inputs say, turned by some columns."""

    def __init__(self, turn=0):
        super().__init__()
        self.turn = turn

    def forward(self, x, attention_mask=None):
        return x.roll(self.turn, -1)


def test_decisions_are_counted_and_errors_are_relative():
    x = torch.eye(4)
    x[0, 1] = 1.5  # turned by one, the second column still wins nowhere else
    same = agreement(Fixed(), Fixed(), [x])
    assert (same.samples, same.rows, same.top1, same.kl, same.relative_error) == (4, 4, 1.0, 0.0, 0.0)
    other = agreement(Fixed(), Fixed(1), [x[:2], x[2:]])
    assert other.top1 == 0.0
    assert other.kl > 0
    assert other.relative_error == pytest.approx(float((x - x.roll(1, -1)).norm() / x.norm()))


def test_embeddings_and_maps_are_no_decisions():
    unit = torch.nn.functional.normalize(torch.randn(6, 8), dim=1)
    assert agreement(Fixed(), Fixed(1), [unit]).top1 is None
    assert agreement(Fixed(), Fixed(1), [torch.randn(2, 3, 4, 4)]).top1 is None
    assert agreement(Fixed(), Fixed(), [torch.randn(5, 1)]).top1 is None
    assert agreement(Fixed(), Fixed(), [torch.randn(5, 1)]).cosine == pytest.approx(1)


def test_padding_decides_nothing():
    x = torch.randn(2, 5, 7)
    batch = {"x": x, "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])}
    found = agreement(Fixed(), Fixed(), [batch])
    assert (found.samples, found.rows) == (2, 8)


def test_few_samples_say_nothing_and_the_interval_is_wide():
    few = Agreement(samples=4, top1=0.25, relative_error=1.0)
    assert few.is_low
    assert not few.can_be_judged
    low, high = few.interval()
    assert low < 0.1
    assert high > 0.6
    assert "too few to judge" in few.in_words()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 20))


def test_what_is_held_out_moves_neither_plan_nor_factors():
    model, x = network(), torch.randn(200, 32)
    data = list(x.split(10))
    others = [b if i % 5 != 2 else torch.randn(10, 32) for i, b in enumerate(data)]  # every fifth is held out
    recipe = {"budget": "macs=0.6", "calibration": {"held_out": 0.2}}
    first, second = (tenfold.compress(model, x[:1], recipe, data=d, runtime=QUIET) for d in (data, others))
    assert first.plan == second.plan
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))
    assert first.record.agreement != second.record.agreement
    assert first.record.agreement == agreement(model, first.model, data[2::5])
    assert RunRecord.from_text(first.record.to_yaml()).agreement == first.record.agreement


def test_a_result_that_no_longer_does_what_the_original_does_is_called_that(tmp_path):
    model, x = network(), torch.randn(150, 32)
    with pytest.warns(AgreementWarning, match=r"only \d+% on 50 held-out samples.*more data \(100.*tune="):
        broken = tenfold.compress(model, x[:1], "macs=0.25", data=[x], runtime=QUIET)
    assert "no longer does what the original does" in broken.summary()
    assert "no longer does what the original does" in (broken.save(tmp_path / "it") / "README.md").read_text()


class Fading(nn.Module):
    """A part whose signal is far below the rounding of what it is added to, as of random weights behind many layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": x + 1e-12 * self.body(x)}


def test_outputs_that_do_not_depend_on_what_was_changed_are_called_that():
    """An error of exactly zero is no praise."""
    torch.manual_seed(0)
    with pytest.warns(AgreementWarning, match="to the last bit on 20 held-out samples.*Random weights") as seen:
        small = tenfold.compress(Fading(), torch.randn(1, 32), "macs=0.5", data=[torch.randn(60, 32)], runtime=QUIET)
    assert len([w for w in seen if w.category is AgreementWarning]) == 1
    assert small.plan.factorized
    assert small.record.agreement.is_equal
    assert "equal to the last bit" in small.summary()
    assert "relative error" not in small.record.agreement.figures()


def test_nothing_is_held_out_where_nobody_wants_it():
    model, x = network(), torch.randn(60, 32)
    recipe = {"budget": "macs=0.7", "calibration": {"held_out": 0}}
    found = tenfold.compress(model, x[:1], recipe, data=[x], runtime=QUIET).record.agreement
    assert (found.samples, found.held_out) == (60, False)
    assert "fitted to" in found.in_words()


def test_weights_alone_say_little_of_batch_norms_and_depthwise_layers():
    layers = [nn.Conv2d(8, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=32), nn.Conv2d(32, 64, 3)]
    x = torch.randn(1, 8, 12, 12)
    with pytest.warns(TenfoldWarning, match=r"1 batch norm and 1 depthwise layer.*data="):
        small = tenfold.compress(nn.Sequential(*layers), x, "macs=0.6", runtime=QUIET)
    assert small.record.agreement is None


class Returns(nn.Module):
    """Two layers, and what somebody makes of their scores."""

    def __init__(self, made):
        super().__init__()
        self.body = nn.Linear(64, 64)
        self.head = nn.Linear(64, 5)
        self.made = made

    def forward(self, x):
        return self.made(self.head(self.body(x).relu()))


@pytest.mark.parametrize(
    "made",
    [
        lambda scores: scores.argmax(1),
        lambda scores: {"scores": scores.detach().numpy()},
        lambda scores: scores[:0],
    ],
    ids=["numbers of classes", "arrays of numpy", "no rows"],
)
def test_outputs_that_cannot_be_compared_never_count_as_equal(made):
    model, other = Returns(made).eval(), Returns(made).eval()
    with pytest.raises(DataError, match="agreement with the original cannot be measured"):
        agreement(model, other, [torch.randn(20, 64)])
    data = [torch.randn(32, 64) for _ in range(4)]
    with pytest.warns(TenfoldWarning) as seen:
        small = tenfold.compress(model, data[0][:1], "macs=0.6", data=data, runtime=QUIET)
    assert sum("cannot be measured" in str(w.message) for w in seen if w.category is AgreementWarning) == 1
    assert small.record.agreement is None


def test_distributions_are_compared_by_their_parameters():
    model = Returns(lambda scores: torch.distributions.Categorical(logits=scores)).eval()
    plain = Returns(lambda scores: scores.log_softmax(1)).eval()
    plain.load_state_dict(model.state_dict())
    data = [torch.randn(32, 64) for _ in range(4)]
    found, wanted = (
        tenfold.compress(m, data[0][:1], "macs=0.6", data=data, runtime=QUIET).record.agreement for m in (model, plain)
    )
    assert found.top1 == wanted.top1 < 1
    assert found.kl == pytest.approx(wanted.kl, rel=1e-3)
