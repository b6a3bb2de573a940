"""compress() from Python: the record tells what profile tells, the original stays, any loop may tune."""

from __future__ import annotations

import copy

import pytest
import torch
from tenfold.ranks import rule_from
from torch import nn
from torch.nn import functional as F

from tenfold.checkpoint import load
from tenfold.errors import BudgetError, DataError, PlanError, TenfoldError, UnknownNameError
from tenfold.pipeline import compress
from tenfold.planning import plan as make_plan
from tenfold.profiling import profile
from tenfold.surgery import apply
from tenfold.training import TuneConfig, finetune


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
DATA = [torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(i)) + 1 for i in range(4)]


def test_the_record_says_what_profile_says() -> None:
    model = network()
    result = compress(model, X, budget={"macs": 0.5}, latency=False)
    for measured, cost in ((result.record.before, profile(model, X)), (result.record.after, profile(result.model, X))):
        assert (measured.params, measured.macs, measured.bytes) == (cost.params, cost.macs, cost.bytes)
        assert measured.latency_ms is None
        assert measured.score is None
    assert result.record.after.macs == result.plan.after.macs <= 0.5 * result.record.before.macs
    assert all(layer.rel_error is not None for layer in result.plan.factorized)
    assert set(result.record.seconds) == {"profile", "plan", "apply"}


def test_the_original_is_untouched_and_the_result_shares_nothing_with_it() -> None:
    model = network().train()
    before = copy.deepcopy(model.state_dict())
    result = compress(model, X, budget={"macs": 0.5}, data=DATA, evaluate=lambda m: 0.5, latency=False)
    assert result.original is model
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    ours = {p.data_ptr() for p in model.parameters()} | {b.data_ptr() for b in model.buffers()}
    assert not ours & {p.data_ptr() for p in (*result.model.parameters(), *result.model.buffers())}


def test_batch_norm_is_re_estimated_from_the_data() -> None:
    model = network()
    result = compress(model, X, budget={"macs": 0.5}, data=DATA, use_data="norms", latency=False)
    mean = torch.cat([result.model[0](x) for x in DATA]).mean((0, 2, 3))
    torch.testing.assert_close(result.model[1].running_mean, mean, atol=1e-5, rtol=1e-4)
    without = compress(model, X, budget={"macs": 0.5}, latency=False).model
    assert torch.equal(without[1].running_mean, model[1].running_mean)


def test_a_loop_of_ones_own_tunes_and_is_scored() -> None:
    steps: list[str] = []

    def loss(model: nn.Module) -> torch.Tensor:
        return F.cross_entropy(model(DATA[0]), torch.arange(16) % 4)

    def loop(model: nn.Module) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()

    def score(model: nn.Module) -> float:
        with torch.no_grad():
            return float(1 / (1 + loss(model)))

    result = compress(
        network(), X, budget={"macs": 0.5}, tune=loop, evaluate=score, latency=False, observe=steps.append
    )
    scores = result.record.scores
    assert list(scores) == ["original", "compressed", "tuned"]
    assert scores["tuned"] > scores["compressed"]
    assert result.record.after.score == scores["tuned"] == score(result.model)
    assert result.record.before.score == scores["original"]
    assert steps == ["profile", "plan", "apply", "evaluate", "evaluate", "tune", "evaluate"]
    assert result.record.tuning == ()


def test_the_history_of_finetune_goes_into_the_record() -> None:
    batches = [(x, torch.arange(16) % 4) for x in DATA]
    result = compress(
        network(),
        X,
        budget={"macs": 0.5},
        tune=lambda m: finetune(m, batches, TuneConfig(epochs=2)),
        latency=False,
    )
    assert [epoch["epoch"] for epoch in result.record.tuning] == [1, 2]


def test_batch_norm_is_folded_last_and_the_checkpoint_loads(tmp_path) -> None:
    model = network()
    tuned = []
    options = {"budget": {"macs": 0.5}, "data": DATA, "tune": lambda m: tuned.append(len(norms_of(m)))}
    plain = compress(model, X, latency=False, **options)
    folded = compress(model, X, fold=True, **options)
    assert tuned == [len(norms_of(model))] * 2
    assert norms_of(model)
    assert not norms_of(folded.model)
    assert folded.plan.fused
    assert not plain.plan.fused
    with torch.no_grad():
        torch.testing.assert_close(folded.model(X), plain.model.eval()(X), rtol=1e-4, atol=1e-5)
    assert folded.record.after.macs == plain.record.after.macs
    assert folded.record.after.params < plain.record.after.params
    assert folded.record.before.params == plain.record.before.params
    loaded, plan = load(network(), folded.save(tmp_path / "folded"))
    assert plan == folded.plan
    assert torch.equal(loaded.eval()(X), folded.model(X))
    again = compress(model, X, plan=plan, latency=False)
    assert again.plan.fused == plan.fused
    assert not norms_of(again.model)


def norms_of(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def test_latency_is_measured_on_its_own_inputs() -> None:
    result = compress(network(), X, budget={"macs": 0.5}, latency_inputs=X.repeat(3, 1, 1, 1))
    latency = result.record.after.latency
    assert latency is not None
    assert latency.batch_size == 6
    assert result.record.after.latency_ms == latency.median_ms
    assert result.record.speedup is not None
    assert result.record.after.macs == profile(result.model, X).macs  # costs are those of the example inputs


def test_a_plan_is_carried_out_as_it_is() -> None:
    model = network()
    plan = make_plan(model, profile(model, X), rule=rule_from("fixed", ranks={"3": {"out": 5, "in": 4}}))
    edited = plan.replace(
        layers=tuple(p.replace(rank={"out": 7, "in": 3}) if p.path == "3" else p for p in plan.layers)
    )
    result = compress(model, X, plan=edited, latency=False)
    assert result.model[3].rank == {"out": 7, "in": 3}
    assert result.plan.layer("3").after.params == 16 * 3 + 7 * 3 * 9 + 32 * 7  # counted anew
    expected = apply(model, edited).eval()
    assert torch.equal(result.model.eval()(X), expected(X))


def test_a_run_that_would_do_nothing_says_why() -> None:
    with pytest.raises(PlanError, match=r"nothing is to be done.*kept as asked"):
        compress(network(), X, rule=rule_from("ratio", share=0.5), keep=["*"], latency=False)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(BudgetError):
        compress(network(), X, budget={"macs": 1e-6}, latency=False)
    with pytest.raises(TenfoldError):
        compress(network(), torch.zeros(2, 5, 8, 8), budget={"macs": 0.5}, latency=False)


def test_summary_shows_numbers_and_reasons() -> None:
    text = compress(network(), X, budget={"macs": 0.5}, rule="ratio", evaluate=lambda m: 0.875, latency=False).summary()
    assert "87.50 %" in text
    assert "BatchNorm2d" in text
    assert "tucker2 out=" in text


@pytest.mark.parametrize("use_data", ["sequential", "layers", "norms"])
def test_data_without_a_batch_are_refused(use_data) -> None:
    spent = iter(DATA)
    list(spent)
    for data in ([], spent):
        with pytest.raises(DataError, match=r"no calibration batches.*leave data out"):
            compress(network(), X, budget={"macs": 0.5}, data=data, use_data=use_data, latency=False)


def test_a_misspelt_use_of_data_is_refused() -> None:
    words = r"use_data='sequental' must be sequential, layers or norms\. Did you mean sequential\?"
    with pytest.raises(UnknownNameError, match=words):
        compress(network(), X, budget={"macs": 0.5}, data=DATA, use_data="sequental", latency=False)
