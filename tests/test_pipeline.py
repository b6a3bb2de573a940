"""compress() from Python: the record tells what profile tells, the original stays, any loop may tune."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tenfold.allocation import choose
from tenfold.checkpoint import load
from tenfold.errors import BudgetError, DataError, PlanError, RecipeError, TenfoldError, UnknownNameError
from tenfold.pipeline import carry_out, compress
from tenfold.planning import Score, decide
from tenfold.planning import plan as make_plan
from tenfold.profiling import profile
from tenfold.records import Metric, OptionTable, Recipe
from tenfold.runtime import Runtime
from tenfold.surgery import apply
from tenfold.training import TuneConfig, finetune

QUIET = Runtime(measure=False)
RECIPE_OF_DATA = {"budget": "macs=0.5", "keep_ends": False, "formats": "low_rank,tucker2"}


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
    result = compress(model, X, "macs=0.5", runtime=QUIET)
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
    result = compress(model, X, "macs=0.5", data=DATA, evaluate=lambda m: 0.5, runtime=QUIET)
    assert result.original is model
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    ours = {p.data_ptr() for p in model.parameters()} | {b.data_ptr() for b in model.buffers()}
    assert not ours & {p.data_ptr() for p in (*result.model.parameters(), *result.model.buffers())}


def test_batch_norm_is_re_estimated_from_the_data() -> None:
    model = network()
    calibration = {"method": "batchnorm", "held_out": 0}
    result = compress(model, X, {"budget": "macs=0.5", "calibration": calibration}, data=DATA, runtime=QUIET)
    mean = torch.cat([result.model[0](x) for x in DATA]).mean((0, 2, 3))
    torch.testing.assert_close(result.model[1].running_mean, mean, atol=1e-5, rtol=1e-4)
    without = compress(model, X, "macs=0.5", runtime=QUIET).model
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

    runtime = QUIET.replace(on_event=lambda event: steps.append(event.step) if event.done is None else None)
    result = compress(network(), X, "macs=0.5", tune=loop, evaluate=score, runtime=runtime)
    scores = result.record.scores
    assert list(scores) == ["original", "compressed", "tuned"]
    assert scores["tuned"] > scores["compressed"]
    assert result.record.after.score == scores["tuned"] == score(result.model)
    assert result.record.before.score == scores["original"]
    assert steps == ["profile", "evaluate", "plan", "apply", "evaluate", "tune", "evaluate"]
    assert result.record.tuning == ()


def test_the_history_of_finetune_goes_into_the_record() -> None:
    batches = [(x, torch.arange(16) % 4) for x in DATA]
    result = compress(
        network(),
        X,
        "macs=0.5",
        tune=lambda m: finetune(m, batches, TuneConfig(epochs=2)),
        runtime=QUIET,
    )
    assert [epoch["epoch"] for epoch in result.record.tuning] == [1, 2]


def test_batch_norm_is_fused_last_and_the_checkpoint_loads(tmp_path) -> None:
    model = network()
    tuned = []
    options = {"data": DATA, "tune": lambda m: tuned.append(len(norms_of(m)))}
    plain = compress(model, X, "macs=0.5", runtime=QUIET, **options)
    fused = compress(model, X, {"budget": "macs=0.5", "fuse_batchnorm": True}, **options)
    assert tuned == [len(norms_of(model))] * 2
    assert norms_of(model)
    assert not norms_of(fused.model)
    assert fused.plan.fused
    assert not plain.plan.fused
    with torch.no_grad():
        torch.testing.assert_close(fused.model(X), plain.model.eval()(X), rtol=1e-4, atol=1e-5)
    assert fused.record.after.macs == plain.record.after.macs
    assert fused.record.after.params < plain.record.after.params
    assert fused.record.before.params == plain.record.before.params
    loaded, plan = load(network(), fused.save(tmp_path / "fused"))
    assert plan == fused.plan
    assert torch.equal(loaded.eval()(X), fused.model(X))
    again = compress(model, X, plan, runtime=QUIET)
    assert again.plan.fused == plan.fused
    assert not norms_of(again.model)


def norms_of(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def test_latency_is_measured_on_its_own_inputs() -> None:
    result = compress(network(), X, "macs=0.5", runtime=Runtime(latency_inputs=X.repeat(3, 1, 1, 1)))
    latency = result.record.after.latency
    assert latency is not None
    assert latency.batch_size == 6
    assert result.record.after.latency_ms == latency.median_ms
    assert result.record.speedup is not None
    assert result.record.after.macs == profile(result.model, X).macs  # costs are those of the example inputs


def test_a_plan_is_carried_out_as_it_is() -> None:
    model = network()
    plan = make_plan(model, profile(model, X), {"rule": {"name": "fixed", "ranks": {"3": {"out": 5, "in": 4}}}})
    edited = plan.replace(
        layers=tuple(p.replace(rank={"out": 7, "in": 3}) if p.path == "3" else p for p in plan.layers)
    )
    result = compress(model, X, edited, runtime=QUIET)
    assert result.model[3].rank == {"out": 7, "in": 3}
    assert result.plan.layer("3").after.params == 16 * 3 + 7 * 3 * 9 + 32 * 7  # counted anew
    expected = apply(model, edited).eval()
    assert torch.equal(result.model.eval()(X), expected(X))


def test_a_run_that_would_do_nothing_says_why() -> None:
    with pytest.raises(PlanError, match=r"nothing is to be done.*Reasons: 100.0% in \d+ layers: kept as asked by '\*'"):
        compress(network(), X, {"rule": {"name": "ratio", "share": 0.5}, "keep": "*"}, runtime=QUIET)


def test_a_model_without_parameters_says_so_too() -> None:
    class Packed(nn.Module):  # as quantized layers are: the weights are no parameters
        def __init__(self) -> None:
            super().__init__()
            self.weights = torch.randn(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weights

    for model, words in (
        (nn.Sequential(Packed(), nn.ReLU()), "1 layer: Packed .*has no parameters: packed weights"),
        (nn.Sequential(nn.ReLU()), "1 layer: ReLU"),
    ):
        with pytest.raises(PlanError, match=f"Reasons: .*{words}"):
            compress(model, torch.zeros(1, 8), "params=0.5", runtime=QUIET)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(BudgetError):
        compress(network(), X, "macs=1e-6", runtime=QUIET)
    with pytest.raises(TenfoldError):
        compress(network(), torch.zeros(2, 5, 8, 8), "macs=0.5", runtime=QUIET)


def test_summary_shows_numbers_and_reasons() -> None:
    text = compress(
        network(), X, {"budget": "macs=0.5", "rule": "ratio"}, evaluate=lambda m: 0.875, runtime=QUIET
    ).summary()
    assert "87.50 %" in text
    assert "BatchNorm2d" in text
    assert "tucker2 out=" in text


@pytest.mark.parametrize("method", ["sequential", "independent", "batchnorm"])
def test_data_without_a_batch_are_refused(method: str) -> None:
    spent = iter(DATA)
    list(spent)
    for data in ([], spent):
        with pytest.raises(DataError, match=r"no calibration batches.*leave data out"):
            compress(network(), X, {"budget": "macs=0.5", "calibration": {"method": method}}, data=data, runtime=QUIET)


def test_data_may_be_ignored() -> None:
    recipe = {"budget": "macs=0.5", "calibration": {"method": "none"}}
    model = network()
    ignored = compress(model, X, recipe, data=DATA, runtime=QUIET)
    assert ignored.plan.layers == compress(model, X, recipe, runtime=QUIET).plan.layers
    assert torch.equal(ignored.model[1].running_mean, model[1].running_mean)


@pytest.mark.parametrize("wrong", [{"formats": "low_rank, tuker2"}, {"algorithms": {"tuker2": "hosvd"}}])
def test_a_misspelt_format_is_refused_before_the_data_are_read(wrong: dict[str, Any]) -> None:
    unread = (pytest.fail("data were read") for _ in range(1))
    with pytest.raises(UnknownNameError, match="unknown format 'tuker2'"):
        compress(network(), X, {"budget": "macs=0.5", **wrong}, data=unread, runtime=QUIET)


def test_a_misspelt_use_of_data_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"calibration.method.*'sequential'"):
        compress(network(), X, {"budget": "macs=0.5", "calibration": {"method": "sequental"}}, data=DATA)


def test_a_decision_can_be_looked_at_and_carried_out() -> None:
    model, recipe = network(), Recipe.of("macs=0.5")
    decision = decide(model, X, recipe, data=DATA)
    assert decision.plan.layers
    assert decision.table is not None
    assert choose(decision.table).layers == decision.plan.layers
    small = carry_out(model, decision, runtime=QUIET)
    whole = compress(model, X, recipe, data=DATA, runtime=QUIET)
    assert small.plan == whole.plan
    assert all(torch.equal(a, b) for a, b in zip(small.model.parameters(), whole.model.parameters(), strict=True))


def test_what_the_plan_was_chosen_from_is_saved_beside_it(tmp_path) -> None:
    small = compress(network(), X, "macs=0.5", runtime=QUIET)
    small.save(tmp_path / "saved")
    table = OptionTable.load(tmp_path / "saved" / "options.json")
    assert [(layer.path, layer.rank) for layer in choose(table).factorized] == [
        (layer.path, layer.rank) for layer in small.plan.factorized
    ]
    ratio = compress(network(), X, {"budget": "macs=0.5", "rule": "ratio"}, runtime=QUIET)
    ratio.save(tmp_path / "ratio")
    assert not (tmp_path / "ratio" / "options.json").exists()  # nothing to explore without distortions


def test_a_loader_with_labels_a_data_set_and_one_tensor_give_what_batches_of_inputs_give() -> None:
    torch.manual_seed(0)
    model, x, y = network().eval(), torch.randn(24, 3, 16, 16), torch.arange(24) % 4
    plain = compress(model, x[:8], RECIPE_OF_DATA, data=list(x.split(8)), runtime=QUIET)
    pairs = TensorDataset(x, y)
    for data in (DataLoader(pairs, batch_size=8), pairs, x, x.numpy(), [x, y]):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = compress(model, x[:8], RECIPE_OF_DATA, data=data, runtime=QUIET)
        assert found.plan == plain.plan
        assert torch.equal(found.model.eval()(x), plain.model.eval()(x))
        labels = [str(w.message) for w in said if "left out, as labels" in str(w.message)]
        assert len(labels) == (data is not x and not isinstance(data, np.ndarray))


def test_scores_that_are_no_fractions_are_recorded_as_what_they_are() -> None:
    metric = Metric(name="perplexity", better="lower")
    values = iter([torch.tensor(7.5), 8.25])
    score = Score(lambda _: next(values), metric=metric)
    found = compress(network(), X, "macs=0.5", evaluate=score, runtime=QUIET)
    assert found.record.metric == metric
    assert found.record.scores == {"original": 7.5, "compressed": 8.25}
    assert "perplexity" in found.summary()
    assert "+0.75" in found.summary()


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (93.4, r"return 0\.934"),
        (float("nan"), "nan"),
        (None, "None"),
        ("good", "a str"),
        (torch.ones(3), r"a Tensor \(3,\)"),
    ],
)
def test_a_score_without_sense_is_told_before_any_work(returned: Any, words: str) -> None:
    steps: list[str] = []
    runtime = QUIET.replace(on_event=lambda event: steps.append(event.step))
    with pytest.raises(DataError, match=words):
        compress(network(), X, "macs=0.5", data=DATA, evaluate=lambda _: returned, runtime=runtime)
    assert steps == ["profile", "evaluate"]


def test_a_score_that_fails_fails_before_any_work() -> None:
    steps: list[str] = []
    runtime = QUIET.replace(on_event=lambda event: steps.append(event.step))
    with pytest.raises(ZeroDivisionError):
        compress(network(), X, "macs=0.5", evaluate=lambda _: 1 / 0, runtime=runtime)
    assert steps == ["profile", "evaluate"]


def test_the_original_is_scored_once_whoever_decides() -> None:
    model = network()
    scored: list[nn.Module] = []

    def score(one: nn.Module) -> float:
        scored.append(one)
        return 0.5

    found = compress(model, X, "macs=0.5", evaluate=score, runtime=QUIET)
    assert scored == [model, found.model]
    decision = decide(model, X, Recipe.of("macs=0.5"), runtime=QUIET)  # without a score, which comes later then
    again = carry_out(model, decision, evaluate=score, runtime=QUIET)
    assert scored == [model, found.model, model, again.model]
    assert again.record.scores == found.record.scores == {"original": 0.5, "compressed": 0.5}


@pytest.mark.parametrize("field", [{"budget": "macs=0.5", "keep": ["nosuch"]}, {"budget_of": {"nosuch.*": "macs=0.5"}}])
def test_a_layer_that_is_not_there_is_said_before_the_model_is_scored(field: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))

    def never(_: nn.Module) -> float:
        raise AssertionError

    with pytest.raises(UnknownNameError, match="no layer matches 'nosuch"):
        compress(model, torch.zeros(1, 16), field, evaluate=never)
