"""The sensitivity table: right numbers, never measured twice, resumed after a kill, monotone where scores are noisy."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tenfold.calibration.collect import collect_moments
from tenfold.decompositions import decompose
from tenfold.errors import DataError, PlanError, UnknownNameError
from tenfold.layers import FactorizedLayer
from tenfold.planning import Score, Sensitivity
from tenfold.planning.single_layer import digest_model, output_errors, replaced, substitute
from tenfold.records import SensitivityTable
from tests.planning.fakes import BASELINE, Scorer, costs, inputs, net

FORMATS = ("tucker2", "low_rank")


@pytest.fixture
def model() -> nn.Sequential:
    return net()


RECIPE = ("formats", "algorithms", "keep", "seed", "calibration")


def made(model: nn.Module, **options: Any) -> Sensitivity:
    recipe = {"formats": FORMATS} | {name: options.pop(name) for name in RECIPE if name in options}
    return Sensitivity(model, costs(model), recipe, **options)


def test_output_errors_are_those_of_the_outputs(model: nn.Sequential) -> None:
    batches = [inputs(1), inputs(2, samples=3)]
    found = made(model, batches=batches)
    error = found.error("3", "tucker2", {"out": 6, "in": 5})
    dense = decompose(model[3].weight, "tucker2", {"out": 6, "in": 5}).value.to_dense()
    with torch.no_grad():
        y = torch.cat([model[3](model[:3](x)) for x in batches]).double()
        z = torch.cat([F.conv2d(model[:3](x), dense, model[3].bias, padding=1) for x in batches]).double()
    missed = float((y - z).square().sum())
    power = float((y - y.mean((0, 2, 3), keepdim=True)).square().sum())
    assert error == pytest.approx((missed / power) ** 0.5, rel=1e-5)
    assert 0.05 < error < 1.5


def test_hooks_of_a_layer_are_no_error_of_its_substitute() -> None:
    model = nn.Sequential(nn.Linear(8, 6)).eval()
    same = copy.deepcopy(model[0])
    model[0].register_forward_hook(lambda _, __, out: out * 3)
    assert output_errors(model, "0", [same], [torch.randn(16, 8)]) == [0.0]


class Tokens(nn.Module):
    """A linear layer over tokens, of which the mask says which are real."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 6)

    def forward(self, tokens: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.layer(tokens) * attention_mask.unsqueeze(-1)


def test_padding_counts_nowhere() -> None:
    model, other = Tokens(), nn.Linear(8, 6)
    tokens, mask = torch.randn(4, 5, 8), torch.arange(5) < torch.tensor([[5], [3], [1], [4]])
    padded = torch.where(mask.unsqueeze(-1), tokens, 100 * torch.randn(4, 5, 8))
    (found,) = output_errors(model, "layer", [other], [{"tokens": padded, "attention_mask": mask.long()}])
    (wanted,) = output_errors(model.layer, "", [other], [tokens[mask]])
    assert found == pytest.approx(wanted, rel=1e-6)


def test_errors_without_data_are_those_of_the_weight(model: nn.Sequential) -> None:
    wanted = decompose(model[7].weight, "low_rank", {"rank": 5}).rel_error
    assert made(model).error("7", "low_rank", {"rank": 5}) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.filterwarnings("ignore::tenfold.errors.CalibrationWarning")
def test_moments_make_the_error_smaller_by_their_bias(model: nn.Sequential) -> None:
    batches = [inputs(seed, samples=40) for seed in range(4)]
    moments = collect_moments(model, batches)
    plain, aware = made(model, batches=batches), made(model, batches=batches, moments=moments)
    rank = {"out": 5, "in": 5}
    assert aware.error("3", "tucker2", rank) < 0.9 * plain.error("3", "tucker2", rank)


def test_scores_are_of_one_layer_at_a_time_and_leave_the_model_alone(model: nn.Sequential) -> None:
    scorer, before = Scorer({"3": 0.5, "7": 0.2}), digest_model(model)
    found = made(model, evaluate=scorer)
    assert found.score("3", "tucker2", {"out": 8, "in": 8}) == pytest.approx(BASELINE - 0.25)
    assert found.score("7", "low_rank", {"rank": 8}) == pytest.approx(BASELINE - 0.15)
    assert scorer.calls == [{}, {"3": 8}, {"7": 8}]
    assert digest_model(model) == digest_model(found._model) == before
    assert not any(isinstance(m, FactorizedLayer) for m in found._model.modules())


def test_nothing_is_measured_twice(model: nn.Sequential, tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    scorer = Scorer({"3": 0.5})
    first = made(model, evaluate=scorer, batches=[inputs()], path=file).measure(3, scores=True)
    count = len(scorer.calls)
    assert count == 1 + sum(len(layer.points) for layer in first.layers)
    again = made(model, evaluate=Scorer({}, stop=0), batches=[inputs()], path=file).measure(3, scores=True)
    assert again == first == SensitivityTable.load(file)


def test_goes_on_where_it_was_interrupted(model: nn.Sequential, tmp_path: Path) -> None:
    file, weights = tmp_path / "table.json", {"3": 0.5, "7": 0.2}
    whole = made(model, evaluate=Scorer(weights), batches=[inputs()]).measure(4, scores=True)
    calls = 0
    for stop in (1, 4, 3, None):
        scorer = Scorer(weights, stop=stop)
        found = made(model, evaluate=scorer, batches=[inputs()], path=file)
        if stop is None:
            assert found.measure(4, scores=True) == whole
        else:
            with pytest.raises(KeyboardInterrupt):
                found.measure(4, scores=True)
        calls += len(scorer.calls)
    assert calls == 1 + sum(len(layer.points) for layer in whole.layers)


def test_two_that_measure_at_once_keep_what_the_other_measured(model: nn.Sequential, tmp_path: Path) -> None:
    file, rank = tmp_path / "table.json", {"rank": 5}
    first, second = (made(model, evaluate=Scorer({"7": 0.2}), path=file) for _ in range(2))
    score = first.score("7", "low_rank", rank)
    error = second.error("7", "low_rank", rank)
    second.error("7", "low_rank", {"rank": 6})
    both, more = SensitivityTable.load(file).layer("7").points
    assert (both.score, both.output_error, more.score) == (score, error, None)
    assert second.score("7", "low_rank", rank) == score
    assert second._bench.evaluate.evaluate.calls == []  # type: ignore[union-attr]


def test_a_killed_process_loses_one_measurement_at_most(tmp_path: Path) -> None:
    file, log = tmp_path / "table.json", tmp_path / "log"
    script = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.planning.fakes import Scorer, costs, net
from tenfold.planning import Score, Sensitivity
scorer = Scorer({{"3": 0.5}})
def slow(model):
    with open({str(log)!r}, "a") as file:
        file.write("x")
    time.sleep(float(sys.argv[1]))
    return scorer(model)
model = net()
Sensitivity(model, costs(model), {{"formats": {FORMATS!r}}}, evaluate=slow, path={str(file)!r}).measure(6, scores=True)
"""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", script, "0.1"], env=env)
    deadline = time.monotonic() + 60
    while (not log.exists() or log.stat().st_size < 5) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    started = log.stat().st_size
    kept = SensitivityTable.load(file)
    scored = sum(p.score is not None for layer in kept.layers for p in layer.points) + (kept.baseline is not None)
    assert started - 1 <= scored <= started
    assert started >= 5
    subprocess.run([sys.executable, "-c", script, "0"], env=env, check=True)
    whole = SensitivityTable.load(file)
    total = 1 + sum(len(layer.points) for layer in whole.layers)
    assert log.stat().st_size == total + (started - scored)
    assert list(tmp_path.glob("*.partial")) == []
    assert whole == made(net(), evaluate=Scorer({"3": 0.5})).measure(6, scores=True)


def test_other_conditions_are_refused_and_other_formats_added(model: nn.Sequential, tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    made(model, formats=["low_rank"], path=file).measure(2)
    added = made(model, formats=FORMATS, path=file).measure(2)
    assert added.layer("3").formats == ("low_rank", "tucker2")
    for options, word in (({"seed": 3}, "seed"), ({"batches": [inputs()]}, "samples")):
        with pytest.raises(DataError, match=f"other conditions: {word}"):
            made(model, path=file, **options)
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] += 1  # type: ignore[union-attr, index, operator]
    with pytest.raises(DataError, match="other conditions: model"):
        made(model, path=file)
    file.write_text(json.dumps({"version": 1}))
    with pytest.raises(DataError, match="not a sensitivity table"):
        made(model, path=file)


@pytest.mark.filterwarnings("ignore::tenfold.errors.CalibrationWarning")
def test_other_data_of_the_same_size_are_other_conditions(model: nn.Sequential, tmp_path: Path) -> None:
    file, (one, other) = tmp_path / "table.json", ([inputs(seed, samples=40)] for seed in (1, 2))
    moments = {"3": collect_moments(model, one)["3"]}
    options = {"formats": ["tucker2"], "batches": one, "moments": moments, "path": file}
    first = made(model, **options).measure(2)
    key = first.key.algorithms["tucker2"]
    assert {settings["name"] for settings in key} == {
        "weighted_als",
        "hooi",
    }  # of layer 3, and of those without moments
    assert made(model, **options | {"batches": [inputs(1, samples=40)]}).table == first
    hooi = {"tucker2": "hooi"}
    shifted = {"3": moments["3"].replace(mean=moments["3"].mean + 1e-9)}
    wrong = {"batches": other, "moments": shifted, "algorithms": hooi}
    for name, said in (("batches", "data"), ("moments", "moments"), ("algorithms", "algorithms of tucker2")):
        with pytest.raises(DataError, match=rf"other conditions: {said} \("):
            made(model, **options | {name: wrong[name]})
    old = json.loads(file.read_text()) | {"version": 1}
    file.write_text(json.dumps(old))
    with pytest.raises(DataError, match=r"version 1 does not tell on which data .* choose another file, or delete"):
        made(model, **options)


def test_what_scores_depend_on_matters_once_there_are_some(model: nn.Sequential, tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    errors = made(model, path=file).measure(2)
    scored = made(model, path=file, evaluate=Score(Scorer({"3": 0.5}), {"images": 100})).measure(2, scores=True)
    assert scored.layer("3").points[0].output_error == errors.layer("3").points[0].output_error
    with pytest.raises(DataError, match=r"other conditions: about .*100.* now .*200"):
        made(model, path=file, evaluate=Score(Scorer({}), {"images": 200}))
    assert made(model, path=file).measure(2) == scored


def test_layers_that_cannot_be_compressed_say_so(model: nn.Sequential) -> None:
    found = made(model, formats=["tucker2"], keep=["3"], evaluate=Scorer({}))
    table = found.measure(2, scores=True)
    assert table.layer("3").state == "not compressible"
    assert "kept as asked" in table.layer("3").reason
    assert "low_rank serves" in table.layer("7").reason
    assert table.layer("1").state == "not compressible"
    assert [layer.path for layer in table.compressible] == ["0"]
    assert all(not layer.points for layer in table.layers if layer.state == "not compressible")
    with pytest.raises(PlanError, match="cannot be compressed: kept as asked"):
        found.score("3", "tucker2", {"out": 2, "in": 2})
    with pytest.raises(UnknownNameError):
        made(model, keep=["nothing"])


def test_noisy_scores_are_fitted_monotone(model: nn.Sequential) -> None:
    noise = {("7", 3): -0.06, ("7", 9): 0.05, ("7", 28): -0.04}
    found = made(model, evaluate=Scorer({"7": 0.4}, noise), formats=["low_rank"])
    ranks = [{"rank": r} for r in (1, 3, 9, 15, 22, 28)]
    raw = [found.score("7", "low_rank", rank) for rank in ranks]
    assert raw != sorted(raw)
    fitted = found.curve("7", "low_rank", found.candidates("7", "low_rank"), measured=2)
    assert fitted == sorted(fitted)
    assert max(fitted) <= BASELINE + 1e-6
    exact = made(model, evaluate=Scorer({"7": 0.4}), formats=["low_rank"])
    straight = exact.curve("7", "low_rank", [{"rank": 11}], measured=6)
    assert straight[0] == pytest.approx(BASELINE - 0.4 * (1 - 11 / 32), abs=1e-3)


def test_distortion_follows_what_the_ranks_drop(model: nn.Sequential) -> None:
    with torch.no_grad():  # otherwise the small ranks of a random weight all drop "everything"
        model[3].weight *= (0.7 ** torch.arange(16.0)).view(-1, 1, 1, 1) * (0.7 ** torch.arange(16.0)).view(1, -1, 1, 1)
    found = made(model, evaluate=Scorer({"3": 0.5}))
    distortion = found.distortion_at("3", "tucker2")
    full, some, little = distortion(np.array([[16, 16], [8, 8], [2, 2]]))
    assert full == 0
    assert 0 < some < little <= 0.5
    along = found.candidates("3", "tucker2", 6)
    at = np.array([[r["out"], r["in"]] for r in along])
    assert distortion(at) == pytest.approx([0.5 * (1 - r["in"] / 16) for r in along], abs=1e-6)


def test_candidates_are_spread_from_the_smallest_to_the_largest(model: nn.Sequential) -> None:
    found = made(model)
    ranks = [r["rank"] for r in found.candidates("7", "low_rank", 4)]
    assert ranks[0] == 1
    assert ranks == sorted(set(ranks))
    assert len(ranks) == 4
    every = found.candidates("7", "low_rank")
    assert every[-1]["rank"] == ranks[-1] == 28  # 28·(256 + 32) < 256·32 ≤ 29·(256 + 32)


def test_batch_norm_is_estimated_for_the_score_and_put_back(model: nn.Sequential) -> None:
    means: list[torch.Tensor] = []

    def evaluate(candidate: nn.Module) -> float:
        means.append(candidate[1].running_mean.clone())  # type: ignore[index]
        return 0.5

    found = made(
        model,
        evaluate=evaluate,
        calibration={"method": "batchnorm"},
        batches=[inputs(3, samples=20)],
        formats=["low_rank"],
    )
    before = digest_model(found._model)
    found.score("0", "low_rank", {"rank": 4})
    assert torch.equal(means[0], torch.zeros(16))  # the baseline is the model as it is
    assert float(means[1].abs().max()) > 0
    assert digest_model(found._model) == before


def test_wrong_scores_and_batches_are_refused(model: nn.Sequential) -> None:
    with pytest.raises(DataError, match="scoring needs evaluate="):
        made(model).score("7", "low_rank", {"rank": 2})
    with pytest.raises(DataError, match="finite"):
        _ = made(model, evaluate=lambda m: float("nan")).baseline
    with pytest.raises(DataError, match="not an iterator"):
        made(model, batches=iter([inputs()]))
    with pytest.raises(DataError, match="no calibration batches"):
        output_errors(model, "3", [], [])


def test_a_failing_score_puts_the_layer_back(model: nn.Sequential) -> None:
    layer = substitute(model[7], "low_rank", {"rank": 3})
    old = model[7]

    def fail() -> None:
        with replaced(model, "7", layer):
            assert model[7] is layer
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        fail()
    assert model[7] is old


def test_progress_is_told(model: nn.Sequential) -> None:
    seen: list[tuple[int, int]] = []
    made(model, evaluate=Scorer({})).measure(2, scores=True, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_factorized_layers_go_further(model: nn.Sequential) -> None:
    model[7] = substitute(model[7], "low_rank", {"rank": 12})
    found = made(model, evaluate=Scorer({"7": 0.4}), formats=["low_rank"])
    assert [r["rank"] for r in found.candidates("7", "low_rank")] == list(range(1, 12))
    error = found.error("7", "low_rank", {"rank": 6})
    wanted = decompose(model[7].weight, "low_rank", {"rank": 6}).rel_error  # type: ignore[arg-type]
    assert error == pytest.approx(wanted, rel=1e-4)
