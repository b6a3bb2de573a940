"""Dense weights are drawn to low rank by any loop, to the same end after a kill, and are better for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tenfold.errors import CheckpointError, PlanError, TuningError
from tenfold.formats import FORMATS
from tenfold.layers import FactorizedLayer
from tenfold.planning import plan
from tenfold.profiling import profile
from tenfold.records import Cost, LayerPlan, Plan
from tenfold.surgery import apply
from tenfold.training import finetune, parameter_groups
from tenfold.training.low_rank.admm import Admm, AdmmConfig
from tenfold.training.low_rank.projection import PlanProjection
from tenfold.training.low_rank.train_admm import LowRankConfig, LowRankResult, train_admm, train_dense
from tenfold.training.snapshot import FILE_NAME
from tests.training.narrow import CONFIG, Cut, accuracy, batches, cut_in_epoch, data, network, same, state

RANK = 8


@pytest.fixture(scope="module")
def trained() -> nn.Sequential:
    model = network()
    finetune(model, batches, CONFIG)
    assert accuracy(model) > 0.97
    return model


@pytest.fixture(scope="module")
def wanted(trained: nn.Sequential) -> Plan:
    ranks = {"0": RANK, "3": RANK}
    recipe = {"rule": {"name": "fixed", "ranks": ranks}, "formats": "low_rank"}
    return plan(trained, profile(trained, data()[0][:1]), recipe)


@pytest.fixture(scope="module")
def result(trained: nn.Sequential, wanted: Plan) -> LowRankResult:
    return train_admm(trained, wanted, batches, LowRankConfig(train=CONFIG), evaluate=accuracy)


def test_weights_arrive_at_low_rank(result: LowRankResult, trained: nn.Sequential, wanted: Plan) -> None:
    start = Admm(trained, wanted).residuals
    for path, rows in result.training.residuals.items():
        assert rows[-1].primal < 0.1 * start[path].primal
        values = np.linalg.svd(result.training.model.get_submodule(path).weight.detach().numpy(), compute_uv=False)
        assert (values[RANK:] ** 2).sum() <= rows[-1].primal ** 2 * (values**2).sum() * (1 + 1e-4)
        assert result.plan.layer(path).rel_error < 0.1 * start[path].primal


def test_better_than_decomposing_what_was_never_of_low_rank(
    result: LowRankResult, trained: nn.Sequential, wanted: Plan
) -> None:
    """At equal ranks: far above one-shot decomposition, and near the dense network, before any tuning of factors."""
    one_shot = apply(trained, wanted)
    assert accuracy(result.model) > accuracy(one_shot) + 0.08
    assert accuracy(result.model) > accuracy(trained) - 0.05
    assert result.training.history[-1].score > accuracy(trained) - 0.05
    assert [m.rank for m in result.model.modules() if isinstance(m, FactorizedLayer)] == [{"rank": RANK}] * 2


def test_the_given_model_stays_and_monitors_are_complete(
    result: LowRankResult, trained: nn.Sequential, wanted: Plan
) -> None:
    again = network()
    finetune(again, batches, CONFIG)
    assert same(state(trained), state(again))
    told = result.training.summary()
    assert {len(told[k]) for k in ("residual_mean", "residual_max", "projected_score", "dense_score")} == {20}
    assert told["dense_score"][-1] == accuracy(result.training.model)
    with result.training.admm.projected(result.training.model) as plugged:
        assert told["projected_score"][-1] == accuracy(plugged)


def test_same_call_same_result(trained: nn.Sequential, wanted: Plan) -> None:
    train = CONFIG.replace(epochs=2)
    one, two = (train_admm(trained, wanted, batches, LowRankConfig(train=train, tune=train)) for _ in range(2))
    assert same(state(one.model), state(two.model))
    assert one.training.residuals == two.training.residuals
    assert [epoch.score for epoch in one.training.history] == [None, None]
    assert one.tuning is not None
    assert len(one.tuning.history) == 2


@pytest.mark.parametrize("cut", [2, 3, 4])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resumed_equals_uninterrupted(
    trained: nn.Sequential, wanted: Plan, tmp_path: Path, cut: int, optimizer: str
) -> None:
    train = CONFIG.replace(epochs=4, optimizer=optimizer)
    config = LowRankConfig(train=train, tune=train.replace(epochs=1), update_every=2)
    whole = train_admm(trained, wanted, batches, config, evaluate=accuracy)
    with pytest.raises(Cut):
        train_admm(trained, wanted, cut_in_epoch(cut), config, folder=tmp_path, evaluate=accuracy)
    torch.manual_seed(99)  # a new process has other random states
    found = train_admm(trained, wanted, batches, config, folder=tmp_path, evaluate=accuracy)
    assert same(state(found.model), state(whole.model))
    assert same(state(found.training.admm), state(whole.training.admm))
    assert found.training.residuals == whole.training.residuals
    assert found.training.scores == whole.training.scores
    finished = train_admm(trained, wanted, batches, config, folder=tmp_path, evaluate=accuracy)
    assert same(state(finished.model), state(whole.model))
    assert {f.name for f in (tmp_path / "towards").iterdir()} == {FILE_NAME}


def test_other_ranks_or_pulls_are_another_run(trained: nn.Sequential, wanted: Plan, tmp_path: Path) -> None:
    config = LowRankConfig(train=CONFIG.replace(epochs=1))
    train_admm(trained, wanted, batches, config, folder=tmp_path)
    first = wanted.layers[0].replace(rank={"rank": 4})
    with pytest.raises(CheckpointError, match="Use another folder"):
        train_admm(trained, wanted.replace(layers=(first, *wanted.layers[1:])), batches, config, folder=tmp_path)
    with pytest.raises(CheckpointError, match="Use another folder"):
        train_admm(trained, wanted, batches, config.replace(admm=AdmmConfig(rho=0.5)), folder=tmp_path)


def planned(model: nn.Module, path: str, format: str, rank: dict[str, int]) -> Plan:
    """Return a plan of one layer, whatever it costs."""
    layer = LayerPlan(
        path=path, kind="", action="factorize", format=format, rank=rank, reason="", before=Cost(), after=Cost()
    )
    return Plan(tenfold="", model="", before=Cost(), after=Cost(), layers=(layer,))


CONV = nn.Conv2d(8, 12, 3, padding=1)
LINEAR = nn.Linear(24, 16)


@pytest.mark.parametrize("format", FORMATS.names())
@pytest.mark.parametrize("module", [CONV, LINEAR], ids=["conv", "linear"])
def test_every_format_is_projected_onto(format: str, module: nn.Module) -> None:
    """Pulled by the penalty alone, a weight becomes what its format can represent at the rank."""
    from tenfold.layers import spec_of

    torch.manual_seed(0)
    model = nn.Sequential(type(module)(*((8, 12, 3) if module is CONV else (24, 16))))
    spec, _ = spec_of(model[0])
    kind = FORMATS.get(format)
    assert spec is not None
    if kind.unsupported_reason(spec) is not None:
        pytest.skip(str(kind.unsupported_reason(spec)))
    rank = {name: max(1, most // 3) for name, most in kind.max_rank(spec).items()}
    admm = Admm(model, planned(model, "0", format, rank), AdmmConfig(rho=20.0, last_rho=20.0))
    start = admm.residuals["0"].primal
    assert start > 0.05
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5 * float(admm.norms[0]) / 40)
    for _ in range(6):
        for _ in range(20):
            admm.penalty(model).backward()
            optimizer.step()
            optimizer.zero_grad()
        admm.update(model)
    assert admm.residuals["0"].primal < 0.1 * start
    remembered = [name for name in admm.state_dict() if name.startswith("projection.factors")]
    assert bool(remembered) == (not kind.svd_bounds_error)  # CP goes on from the factors that it had
    small = admm.projection.factorize(model)
    assert small[0].fit.rel_error < 0.1 * start


def test_layers_without_a_bias_become_factors() -> None:
    """An embedding has no attribute of that name; CP factors tell how stable they are."""
    model = nn.Sequential(nn.Embedding(40, 12))
    small = Admm(model, planned(model, "0", "low_rank", {"rank": 3}), AdmmConfig()).projection.factorize(model)
    assert small(torch.tensor([1, 2])).shape == (2, 12)
    model = nn.Sequential(nn.Conv2d(8, 12, 3, bias=False))
    small = Admm(model, planned(model, "0", "cp3", {"rank": 6}), AdmmConfig()).projection.factorize(model)
    assert small[0].bias is None
    assert small[0].fit.stability is not None


def test_penalty_is_the_augmented_lagrangian(trained: nn.Sequential, wanted: Plan) -> None:
    """Value and gradient against NumPy, with multipliers that are not zero."""
    admm = Admm(trained, wanted)
    admm.update(trained)
    model = network()
    model.load_state_dict(trained.state_dict())
    value = admm.penalty(model)
    value.backward()
    expected = 0.0
    for i, path in enumerate(admm.paths):
        first = trained.get_submodule(path).weight.detach().double().numpy()
        u, s, vh = np.linalg.svd(first, full_matrices=False)
        image = (u[:, :RANK] * s[:RANK]) @ vh[:RANK]
        former = admm.config.rho / (first**2).sum()
        now = admm.residuals[path].rho / (first**2).sum()
        multiplier = (first - image) * former / now
        apart = first - image + multiplier
        expected += now / 2 * (apart**2).sum()
        gradient = model.get_submodule(path).weight.grad
        np.testing.assert_allclose(gradient.numpy(), now * apart, rtol=1e-3, atol=1e-6)
        assert admm.get_buffer(f"u{i}").numpy() == pytest.approx(multiplier, rel=1e-3, abs=1e-5)
    assert value.item() == pytest.approx(expected, rel=1e-4)


def test_images_are_plugged_in_and_out_exactly(trained: nn.Sequential, wanted: Plan) -> None:
    admm = Admm(trained, wanted)
    before, storage = state(trained), trained[0].weight.data_ptr()
    found = 0

    def fail(plugged: nn.Module) -> None:
        nonlocal found
        found = int(np.linalg.matrix_rank(plugged[0].weight.detach().numpy(), tol=1e-4))
        raise Cut

    with pytest.raises(Cut), admm.projected(trained) as plugged:
        fail(plugged)
    assert found == RANK
    assert same(state(trained), before)
    assert trained[0].weight.data_ptr() == storage


def test_strength_follows_the_distance(trained: nn.Sequential, wanted: Plan) -> None:
    """A layer that does not move is pulled harder and harder, up to the ceiling; one that is there, no longer."""
    norm = float(trained[0].weight.detach().square().sum())
    config = AdmmConfig(updates=4, rho=0.1, last_rho=0.1, boost=2.0, ceiling=5.0 / norm)
    admm = Admm(trained, wanted, config)
    rhos = [admm.update(trained)["0"].rho for _ in range(8)]
    assert rhos == pytest.approx([min(0.1 * 2 ** (i + 1), 5.0) for i in range(8)], rel=1e-4)
    with torch.no_grad():
        model = network()
        model.load_state_dict(trained.state_dict())
        for i, path in enumerate(admm.paths):
            model.get_submodule(path).weight.copy_(admm.get_buffer(f"z{i}"))
            admm.get_buffer(f"u{i}").zero_()
    relaxed = admm.update(model)["0"].rho
    assert relaxed < rhos[-1]


def test_state_dict_continues_a_loop_of_ones_own(trained: nn.Sequential, wanted: Plan) -> None:
    def loop(model: nn.Module, admm: Admm, steps: range) -> None:
        for step in steps:
            x, y = batches(step)[0]
            loss = nn.functional.cross_entropy(model(x), y) + admm.penalty(model)
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(0.01 * parameter.grad)
                    parameter.grad = None
            admm.update(model)

    def fresh() -> tuple[nn.Module, Admm]:
        model = network()
        model.load_state_dict(trained.state_dict())
        return model, Admm(model, wanted)

    whole, whole_admm = fresh()
    loop(whole, whole_admm, range(6))
    half, half_admm = fresh()
    loop(half, half_admm, range(3))
    other, other_admm = fresh()
    other.load_state_dict(half.state_dict())
    other_admm.load_state_dict(half_admm.state_dict())
    loop(other, other_admm, range(3, 6))
    assert same(state(other), state(whole))
    assert same(state(other_admm), state(whole_admm))


def test_no_decay_on_weights_that_are_drawn_elsewhere(trained: nn.Sequential, wanted: Plan) -> None:
    seen = {}

    def loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        seen["model"] = model
        return nn.functional.cross_entropy(model(inputs), targets)

    config = LowRankConfig(train=CONFIG.replace(epochs=1, weight_decay=0.5))
    found = train_dense(trained, PlanProjection(wanted), batches, config, loss=loss)
    assert seen["model"] is found.model  # the loss sees the model itself, not what is around it
    from tenfold.training.low_rank.train_admm import _Run

    run = _Run(network(), wanted, AdmmConfig(), 1)
    decaying, _ = parameter_groups(run, 0.5)
    assert [p.shape for p in decaying["params"]] == [torch.Size([4, 48])]


def test_refusals(trained: nn.Sequential, wanted: Plan) -> None:
    kept = wanted.replace(layers=tuple(layer.replace(action="keep") for layer in wanted.layers))
    with pytest.raises(PlanError, match="no layer is to be factorized"):
        Admm(trained, kept)
    with pytest.raises(PlanError, match="factorized already"):
        Admm(apply(trained, wanted), wanted)
    frozen = network().requires_grad_(False)
    with pytest.raises(TuningError, match="'0' has no weight that requires grad"):
        Admm(frozen, wanted)
    with pytest.raises(TuningError, match="leave it to the tuning"):
        train_admm(trained, wanted, batches, LowRankConfig(train=CONFIG.replace(ema=0.9)))
    with pytest.raises(PlanError, match="no layer 'absent'"):
        Admm(trained, planned(trained, "absent", "low_rank", {"rank": 1}))
