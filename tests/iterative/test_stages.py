"""The generator: what a stage is, how far each goes, when it ends; any loop may train in between."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import tenfold
from tenfold.errors import BudgetError, DataError, PlanError, RecipeError, TenfoldWarning, TuningError, UnknownNameError
from tenfold.iterative import Schedule, Stage, Training, compress_iteratively, musco, stages
from tenfold.layers import FactorizedLayer
from tenfold.pipeline import Compressed
from tenfold.profiling import agreement, profile
from tenfold.records import Recipe
from tenfold.training import TuneConfig
from tests.iterative.small import accuracy, batches, both, cnn, images, unlabeled

X = images()[0]
ONE = X[:1]
SHALLOW = both(rounds=3, budget={"macs": 0.4}, epochs=1, formats=["low_rank", "tucker2"])
RECIPE, SCHEDULE = SHALLOW
CONFIG = TuneConfig(lr=0.02, train_as="factors")


def low_rank_net() -> nn.Sequential:
    """Return linear layers of rank 6 and a little noise, in which EVBMF finds the six."""
    torch.manual_seed(3)
    net = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))).eval()
    with torch.no_grad():
        for layer in net:
            layer.weight.copy_(torch.randn(64, 6) @ torch.randn(6, 64) / 8 + 0.02 * torch.randn(64, 64))
    return net


def walk(model: nn.Module, how: tuple[Recipe, Schedule], **choices: Any) -> list[Stage]:
    inputs = choices.pop("inputs", ONE)
    return list(stages(model, inputs, *how, **choices))


def ranks(model: nn.Module) -> dict[str, Any]:
    return {path: (m.format, m.rank) for path, m in model.named_modules() if isinstance(m, FactorizedLayer)}


def test_each_stage_meets_its_limit_and_the_last_the_target() -> None:
    net = cnn()
    found = walk(net, SHALLOW)
    whole = profile(net, ONE).cost
    assert [s.index for s in found] == [1, 2, 3]
    for stage in found:
        assert profile(stage.model, ONE).cost == stage.record.after == stage.plan.after == stage.whole.after
        assert stage.record.after.macs <= SCHEDULE.limits(stage.index, RECIPE.budget, whole)["macs"]
    assert [s.record.before for s in found] == [whole, *(s.record.after for s in found[:-1])]


def test_the_given_model_stays_as_it_is() -> None:
    net = cnn()
    state = copy.deepcopy(net.state_dict())
    for stage in stages(net, ONE, *SHALLOW, data=unlabeled()):
        for parameter in stage.model.parameters():
            parameter.data.zero_()
        stage.model.train()
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())
    assert not net.training


def test_a_stage_starts_from_the_weights_as_trained_in_the_one_before() -> None:
    """With every factor doubled in one place, the next stage compresses twice the weight, and not the original one."""
    net = low_rank_net()
    how = both(rounds=2, path="rule", rule={"name": "ratio", "share": 0.25, "of": "params"}, keep_ends=False)
    run = stages(net, X[:1, 0, 0].new_zeros(1, 64), *how)
    first = next(run)
    with torch.no_grad():
        for layer in first.model:
            next(layer.parameters()).mul_(2)
    second = next(run)
    for before, now in zip(net, second.model, strict=True):
        norms = [torch.linalg.matrix_norm(layer.weight.detach(), 2).item() for layer in (before, now)]
        assert norms[1] == pytest.approx(2 * norms[0], rel=0.02)


def test_gradients_and_modes_of_the_training_are_not_handed_on() -> None:
    for stage in stages(cnn(), ONE, *SHALLOW):
        assert not any(m.training for m in stage.model.modules())
        assert all(p.grad is None for p in stage.model.parameters())
        stage.model.train()(X).sum().backward()


def test_the_whole_plan_is_all_stages_in_one_step() -> None:
    net = cnn()
    last = walk(net, SHALLOW)[-1]
    assert last.whole.before == profile(net, ONE).cost
    at_once = tenfold.apply(net, last.whole)
    assert ranks(at_once) == ranks(last.model)
    assert profile(at_once, ONE).cost == last.whole.after
    assert all(layer.reason.startswith("stage ") for layer in last.whole.factorized)


def test_few_layers_at_a_time_visit_each_once_in_a_round() -> None:
    how = both(rounds=2, path="rule", rule={"name": "ratio", "share": 0.6}, layers_per_stage=2, keep_ends=False)
    found = walk(low_rank_net(), how, inputs=torch.zeros(1, 64))
    assert [(s.record.round, list(s.record.layers)) for s in found] == [
        (1, ["0", "1"]),
        (1, ["2", "3"]),
        (2, ["0", "1"]),
        (2, ["2", "3"]),
    ]
    assert found[2].record.layers["0"].was_rank == found[0].record.layers["0"].rank
    assert found[0].record.layers["0"].was_rank is None


@pytest.mark.parametrize(("order", "expected"), [("front", "0123"), ("back", "3210"), ("cost", "2013")])
def test_order(order: Any, expected: str) -> None:
    net = nn.Sequential(nn.Linear(64, 40), nn.Linear(40, 48), nn.Linear(48, 90), nn.Linear(90, 20))
    how = both(
        rounds=1,
        path="rule",
        rule={"name": "ratio", "share": 0.5},
        formats=["low_rank"],
        layers_per_stage=1,
        order=order,
        keep_ends=False,
    )
    found = walk(net, how, inputs=torch.zeros(1, 64))
    assert "".join(path for s in found for path in s.record.layers) == expected


def test_few_layers_at_a_time_meet_the_budget_too() -> None:
    net = cnn()
    found = walk(net, both(rounds=2, budget={"macs": 0.4}, layers_per_stage=1))
    whole = profile(net, ONE).cost
    assert all(len(s.record.layers) == 1 for s in found)
    assert found[-1].record.after.macs <= 0.4 * whole.macs
    for number in (1, 2):
        last = [s for s in found if s.record.round == number][-1]
        assert last.record.after.macs <= 0.4 ** (number / 2) * whole.macs


def test_ends_when_ranks_no_longer_change() -> None:
    how = both(rounds=50, path="rule", rule={"name": "evbmf", "weaken": 0.8, "min_rank": 2}, formats=["low_rank"])
    found = walk(low_rank_net(), how, inputs=torch.zeros(1, 64))
    assert 2 <= len(found) < 20
    for stage in found:
        for layer in stage.record.layers.values():
            assert layer.rank["rank"] >= 6 or layer.was_rank is not None
    with pytest.raises(PlanError, match="nothing is to be done"):
        next(stages(found[-1].model, torch.zeros(1, 64), *how))


def test_ends_when_the_target_is_met_before_the_rounds_are_over() -> None:
    how = both(rounds=20, budget={"macs": 0.4}, path="rule", rule={"name": "ratio", "share": 0.7})
    net = low_rank_net()
    found = walk(net, how, inputs=torch.zeros(1, 64))
    shares = [s.record.after.macs / profile(net, torch.zeros(1, 64)).macs for s in found]
    assert shares[-1] <= 0.4
    assert all(share > 0.4 for share in shares[:-1])


def test_a_final_stage_trains_only() -> None:
    found = walk(cnn(), (RECIPE, SCHEDULE.replace(final_epochs=7)))
    last = found[-1]
    assert [s.final for s in found] == [False, False, False, True]
    assert [s.epochs for s in found] == [1, 1, 1, 7]
    assert [s.done_epochs for s in found] == [0, 1, 2, 3]
    assert not last.plan.factorized
    assert last.record.after == found[-2].record.after
    assert last.whole == found[-2].whole


def test_a_loop_of_ones_own() -> None:
    seen = []
    run = stages(cnn(), ONE, *SHALLOW, data=unlabeled(), evaluate=accuracy)
    for stage in run:
        optimizer = torch.optim.SGD(stage.model.train().parameters(), lr=0.05)
        for x, y in batches(stage.index):
            nn.functional.cross_entropy(stage.model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        seen.append(stage)
    assert len(seen) == 3


def test_the_outcome_is_that_of_compress() -> None:
    net = cnn()
    sent = []
    tune = Training(batches, CONFIG, on_stage=sent.append)
    result = compress_iteratively(net, ONE, *SHALLOW, tune=tune, data=unlabeled(), evaluate=accuracy)
    assert isinstance(result, Compressed)
    record = result.record
    assert [s.scores.keys() for s in record.stages] == [{"compressed", "tuned"}] * 3
    assert [len(s.tuning) for s in record.stages] == [1, 1, 1]
    assert [epoch["stage"] for epoch in record.tuning] == [1, 2, 3]
    assert record.scores == {"original": accuracy(net), **record.stages[-1].scores}
    assert record.after.macs == profile(result.model, ONE).macs == result.plan.after.macs
    assert record.after.score == accuracy(result.model)
    assert "stages" in result.summary()
    assert type(record).from_text(record.to_json()) == record
    assert sent[-1].model is result.model


def test_shuffles_go_on_from_stage_to_stage() -> None:
    asked = []

    def counted(epoch: int) -> Any:
        asked.append(epoch)
        return batches(epoch)

    schedule = SCHEDULE.replace(epochs=2, final_epochs=1)
    compress_iteratively(cnn(), ONE, RECIPE, schedule, tune=Training(counted, CONFIG))
    assert sorted(set(asked)) == list(range(7))


def test_the_agreement_with_the_original_is_measured_where_nothing_was_fitted() -> None:
    net, x = cnn(), unlabeled()
    recipe = RECIPE.replace(calibration={"held_out": 0.25})
    run = compress_iteratively(net, ONE, recipe, SCHEDULE, tune=Training(batches, CONFIG), data=x)
    held = [own[[2, 6, 10, 14]] for own in x]  # a quarter of every batch
    assert run.record.agreement == agreement(net, run.model, held)
    assert run.record.agreement.samples == 12
    assert compress_iteratively(net, ONE, *SHALLOW, tune=Training(batches, CONFIG)).record.agreement is None


def test_batch_norm_is_estimated_anew_where_layers_were_not_fitted_to_data() -> None:
    recipe = RECIPE.replace(calibration={"method": "batchnorm", "held_out": 0})
    stage = next(stages(cnn(), ONE, recipe, SCHEDULE, data=unlabeled()))
    kept = next(stages(cnn(), ONE, *SHALLOW))
    fresh = copy.deepcopy(kept.model)
    tenfold.reestimate_batchnorm_(fresh, unlabeled())
    assert ranks(stage.model) == ranks(kept.model)
    assert all(
        torch.equal(a, b) for a, b in zip(stage.model.state_dict().values(), fresh.state_dict().values(), strict=True)
    )
    assert not torch.equal(kept.model[7].running_mean, stage.model[7].running_mean)


@pytest.mark.parametrize(("fit_to", "near"), [("original", 0), ("current", 1)])
def test_fits_of_later_stages_meet_the_outputs_of(fit_to: Any, near: int) -> None:
    """Trained away from the original in between, the last layer is fitted to the one or to the other."""
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(4))
    net = low_rank_net()[:1]
    rules = ({"name": "fixed", "ranks": {"0": 8}}, {"name": "fixed", "ranks": {"0": 7}})
    run = stages(net, x[:1], *both(rounds=2, path="rule", rules=rules, formats=["low_rank"], fit_to=fit_to), data=[x])
    first = next(run)
    with torch.no_grad():
        next(first.model.parameters()).add_(0.3 * torch.randn(8, 64))
        answers = [net(x), first.model(x)]
        second = next(run).model(x)
    missed = [float((second - answer).norm() / answer.norm()) for answer in answers]
    assert missed[near] < 0.25
    assert missed[1 - near] > 2 * missed[near]


def test_musco_stage_by_stage() -> None:
    """Each stage takes the published way down: R - 0.8 (R - R_evbmf) from the ranks that the layer has now."""
    recipe, schedule = musco(nglobal_compress_iters=2, min_rank=2)
    found = walk(
        low_rank_net(),
        (recipe.replace(keep_ends=False), schedule),
        inputs=torch.zeros(1, 64),
    )
    first = found[0].record.layers["1"]
    assert first.rank == {"rank": int(64 - 0.8 * (64 - 6))}
    second = found[1].record.layers["1"]
    assert second.was_rank == first.rank
    assert second.rank["rank"] < first.rank["rank"]


@pytest.mark.parametrize(
    ("schedule", "kind", "words"),
    [
        ({"budget": {"macs": 0.001}}, BudgetError, "the target of the schedule is out of reach"),
        ({"budget": {"macs": 1.0}}, PlanError, "within the budget as it is"),
        ({"budget": {"macs": 0.5}, "rounds": -1}, TuningError, "invalid schedule"),
        ({"path": "rule", "rule": {"name": "ratio", "share": 1.0}}, PlanError, "all of the layer was asked for"),
    ],
)
def test_what_cannot_be_is_said_before_the_first_stage(schedule: Any, kind: Any, words: str) -> None:
    with pytest.raises(kind, match=words):
        next(stages(cnn(), ONE, *both(**schedule)))


def test_data_without_a_batch_are_refused_at_the_call() -> None:
    with pytest.raises(DataError, match=r"hold no batch|no calibration batches"):
        stages(cnn(), ONE, *SHALLOW, data=iter(()))


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        ({"calibration": {"method": "layer"}}, RecipeError, "calibration.method"),
        ({"fit_to": "orignal"}, TuningError, "fit_to"),
    ],
)
def test_choices_that_do_not_exist_are_refused(fields: dict[str, Any], kind: Any, words: str) -> None:
    with pytest.raises(kind, match=words):
        both(**fields)


class Sides(nn.Module):
    """Layers and a cheap last one; single samples take a side road, which batches of data never do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.main, self.side = (nn.Linear(64, 64) for _ in range(3))
        self.last = nn.Linear(64, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.main(self.first(x).relu()).relu()
        return self.last(hidden + self.side(hidden) if len(x) == 1 else hidden)


def test_layers_without_data_get_the_reason_of_one_step() -> None:
    """That no data reach a layer is said of those alone that none reach."""
    torch.manual_seed(0)
    net, data = Sides(), [torch.randn(64, 64) for _ in range(3)]
    stage = next(stages(net, torch.zeros(1, 64), "macs=0.8", Schedule(rounds=1), data=data))
    step = tenfold.compress(net, torch.zeros(1, 64), "macs=0.8", data=data, runtime=tenfold.Runtime(measure=False))
    for path, words in (("side", "none of the data reach it"), ("last", "too little to be worth distortion")):
        assert words in stage.plan.layer(path).reason
        assert stage.plan.layer(path).reason == stage.whole.layer(path).reason == step.plan.layer(path).reason


def test_that_units_stay_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        stages(cnn(), ONE, "macs=0.5", data=unlabeled())
    assert "units (mlp_width) stay as they are: stages plan layers one by one" in caplog.text
    with pytest.warns(TenfoldWarning, match=r"units \(conv_width\) are not narrowed"):
        stages(cnn(), ONE, {"budget": "macs=0.5", "units": "conv_width"}, data=unlabeled())
    with pytest.raises(UnknownNameError):
        stages(cnn(), ONE, {"budget": "macs=0.5", "units": "width"}, data=unlabeled())
    caplog.clear()
    with caplog.at_level("INFO"):
        stages(cnn(), ONE, {"budget": "macs=0.5", "units": []}, data=unlabeled())
    assert "units" not in caplog.text
