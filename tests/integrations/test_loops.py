"""Stages and the pull towards low rank in loops that are not ours: the model and its optimizer change in place."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tenfold
from tenfold.errors import TuningError
from tenfold.integrations.board import Board
from tenfold.integrations.lightning import LowRankCallback, StagesCallback
from tenfold.integrations.live import LivePull, LiveStages
from tenfold.iterative import Schedule
from tenfold.layers import FactorizedLayer
from tenfold.records import Recipe
from tenfold.runtime import Runtime
from tenfold.training import AdmmConfig

RECIPE = Recipe.of({"budget": {"macs": 0.25}, "keep_ends": False})
SCHEDULE = Schedule(rounds=2, epochs=2)


class Written:
    """A writer of scalars that keeps them."""

    def __init__(self) -> None:
        self.found: dict[str, list[tuple[int, float]]] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.found.setdefault(tag, []).append((step, value))


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))


def start(model: nn.Module) -> Any:
    return tenfold.stages(model, torch.zeros(1, 32), RECIPE, SCHEDULE)


def parameters_of(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    optimizer.zero_grad()
    loss = (model(x) - y).square().mean()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def test_stages_in_place_keep_model_and_optimizer_together() -> None:
    net, x = network(), torch.randn(64, 32)
    y = net(x).detach()
    decayed = [p for p in net.parameters() if p.dim() > 1]
    others = [p for p in net.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    train(net, optimizer, x, y)
    costs = []
    live = LiveStages(start, on_stage=lambda record: costs.append(record.after.macs))
    live.begin(net, [optimizer])
    for _ in range(4):
        assert parameters_of(optimizer) == {id(p) for p in net.parameters()}
        before = [p.detach().clone() for p in net.parameters()]
        train(net, optimizer, x, y)
        assert all(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True)), "all are trained"
        live.epoch_ended(net, [optimizer])
    assert costs == [1024, 512]
    assert isinstance(net[0], FactorizedLayer)
    assert {p.dim() for p in optimizer.param_groups[0]["params"]} == {2}, "factors are decayed as their weight was"
    assert {p.dim() for p in optimizer.param_groups[1]["params"]} == {1}
    assert set(optimizer.state) <= set(net.parameters())
    assert live.result is not None
    assert torch.equal(live.result.model(x), net(x))
    assert live.result.record.after.macs == tenfold.profile(net, torch.zeros(1, 32)).macs == 512


def test_stages_in_place_are_those_of_the_generator() -> None:
    net, x = network(), torch.randn(64, 32)
    y = net(x).detach() + torch.randn(64, 32)
    wanted = tenfold.stages(net, torch.zeros(1, 32), RECIPE, SCHEDULE)
    try:
        stage = next(wanted)
        while True:
            optimizer = torch.optim.SGD(stage.model.parameters(), lr=0.1)
            for _ in range(2):
                train(stage.model, optimizer, x, y)
            stage = wanted.send(None)
    except StopIteration as end:
        result = end.value
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    live = LiveStages(start)
    live.begin(net, [optimizer])
    for _ in range(4):
        train(net, optimizer, x, y)
        live.epoch_ended(net, [optimizer])
    for own, other in zip(net.parameters(), result.model.parameters(), strict=True):
        assert torch.equal(own, other)


def test_what_stages_in_place_cannot_do_is_refused(tmp_path: Path) -> None:
    stored = LiveStages(
        lambda model: tenfold.stages(model, torch.zeros(1, 32), RECIPE, SCHEDULE, runtime=Runtime(folder=tmp_path))
    )
    with pytest.raises(TuningError, match="cannot be resumed from a folder"):
        stored.begin(network(), [])
    alone = nn.Linear(32, 32)
    with pytest.raises(TuningError, match="one layer itself"):
        LiveStages(start).begin(alone, [torch.optim.SGD(alone.parameters())])


def test_lightning_calls_drive_stages_and_the_pull() -> None:
    """The hooks as Lightning calls them, on a part of the module."""
    module = nn.Module()
    module.net = network()
    x = torch.randn(64, 32)
    y = module.net(x).detach()
    written = Written()
    plan = tenfold.plan(
        module.net,
        tenfold.profile(module.net, x[:1]),
        {"rule": {"name": "fixed", "ranks": {"0": 4, "2": 4}}},
    )
    board = Board(written)
    pull = LowRankCallback(LivePull(plan, AdmmConfig(rho=1.0, updates=6), on_update=board.admm), of=lambda m: m.net)
    optimizer = torch.optim.Adam(module.net.parameters(), lr=3e-3)
    trainer: Any = SimpleNamespace(optimizers=[optimizer])
    pull.on_train_start(trainer, module)
    first = max(r.primal for r in pull.pull.admm.residuals.values())
    for _ in range(6):
        for _ in range(20):
            optimizer.zero_grad()
            (module.net(x) - y).square().mean().backward()
            pull.on_before_optimizer_step(trainer, module, optimizer)
            optimizer.step()
        pull.on_train_epoch_end(trainer, module)
    distances = [value for _, value in written.found["admm/largest_primal"]]
    assert len(distances) == 6
    assert distances[-1] < 0.5 * first
    stages = StagesCallback(LiveStages(start, on_stage=board.stage), of=lambda m: m.net)
    stages.on_train_start(trainer, module)
    for _ in range(4):
        train(module.net, optimizer, x, y)
        stages.on_train_epoch_end(trainer, module)
    assert written.found["stage/macs"] == [(1, 1024.0), (2, 512.0)]
    assert written.found["rank/0/rank"][-1] == (2, module.net[0].rank["rank"])


def test_the_trainer_of_transformers_compresses_while_it_trains(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from tenfold.integrations.trainer import LowRankCallback as Pull
    from tenfold.integrations.trainer import StagesCallback as Stages

    config = transformers.BertConfig(
        vocab_size=50,
        max_position_embeddings=8,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=2,
    )
    model = transformers.BertForSequenceClassification(config)
    data = [{"input_ids": torch.randint(0, 50, (8,)), "labels": torch.tensor(i % 2)} for i in range(16)]
    example = {"input_ids": torch.zeros(1, 8).long()}
    recipe = Recipe.of({"budget": {"params": 0.8}, "formats": "low_rank", "keep": "re:.*embeddings.*"})
    schedule = Schedule(rounds=2, epochs=1)
    dense = sum(p.numel() for p in model.parameters())
    plan = tenfold.plan(
        model,
        tenfold.profile(model, example),
        {"rule": {"name": "fixed", "ranks": {"bert.encoder.layer.0.output.dense": 8}}},
    )
    told: list[int] = []
    pull = LivePull(plan, on_update=lambda _, step: told.append(step))
    options = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no"}

    def run(epochs: int, callback: Any) -> None:
        arguments = transformers.TrainingArguments(str(tmp_path), num_train_epochs=epochs, **options)
        transformers.Trainer(model=model, args=arguments, train_dataset=data, callbacks=[callback]).train()

    run(1, Pull(pull))
    assert told == [1]
    live = LiveStages(lambda model: tenfold.stages(model, example, recipe, schedule))
    run(2, Stages(live))
    assert live.result is not None
    assert sum(p.numel() for p in model.parameters()) <= 0.8 * dense
    assert torch.equal(live.result.model.eval()(**example).logits, model.eval()(**example).logits)


def test_a_board_writes_files_for_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    board = Board.to(tmp_path)
    board.admm({}, 1)
    board.writer.add_scalar("x", 1.0, 1)
    board.writer.close()
    assert list(tmp_path.glob("events.*"))
