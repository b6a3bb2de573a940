"""Factorized layers trained as the dense layers that their factors make: the same losses, factors and resumed ends."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tenfold
from tenfold import TuneConfig, finetune
from tenfold.layers import FactorizedLayer
from tenfold.training import TuneProgress, as_dense
from tenfold.training.snapshot import Snapshot, TrainingFolder

FORMATS = ("tucker2", "low_rank", "spatial", "cp3", "tensor_train", "block_term")


def small(formats: Any = "cp3", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 4),
    )
    recipe = {"budget": "params=0.5", "formats": formats, "keep_ends": False}
    return tenfold.compress(net, torch.zeros(1, 3, 8, 8), recipe, runtime=tenfold.Runtime(measure=False)).model


def batches(epoch: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(epoch)
    xs = [torch.randn(8, 3, 8, 8, generator=generator) for _ in range(5)]
    return [(x, x.mean((1, 2, 3)).gt(0).long()) for x in xs]


@pytest.mark.parametrize("format", FORMATS)
def test_gradients_of_the_factors_are_the_same(format: str) -> None:
    model = small([format, "low_rank"]).double().train()
    assert any(isinstance(module, FactorizedLayer) for module in model.modules())
    x, found = batches()[0][0].double(), []
    for dense in (False, True):
        model.zero_grad()
        with as_dense(model, enabled=dense):
            output = model(x)
        output.square().sum().backward()
        found.append([output, *(p.grad for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2, "ema": 0.9}, {"optimizer": "adamw", "freeze_norms": True}])
def test_twenty_steps_have_the_same_losses(settings: dict[str, Any]) -> None:
    histories = []
    for way in ("factors", "dense"):
        config = TuneConfig(epochs=4, lr=0.003, autocast="off", train_as=way, **settings)
        histories.append([epoch.loss for epoch in finetune(small(), batches, config).history])
    assert histories[0] == pytest.approx(histories[1], abs=1e-4)
    assert histories[0][0] != histories[0][-1]


def test_factors_are_multiplied_out_once_per_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    layer = tenfold.compress(net, torch.zeros(1, 64), "macs=0.5", runtime=tenfold.Runtime(measure=False)).model[0]
    twice = nn.Sequential(layer, nn.ReLU(), layer)
    made = []
    own = type(layer.factorization()).to_dense
    monkeypatch.setattr(type(layer.factorization()), "to_dense", lambda f: (made.append(1), own(f))[1])
    with as_dense(twice):
        twice(torch.randn(2, 64))
        assert len(made) == 1
        with torch.no_grad():
            next(layer.parameters()).mul_(2)
        twice(torch.randn(2, 64))
        assert len(made) == 2


def test_the_layers_run_as_factors_again_afterwards_also_after_an_error() -> None:
    model = small()
    before = copy.deepcopy(model)
    with pytest.raises(KeyboardInterrupt), as_dense(model):
        raise KeyboardInterrupt
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    x = batches()[0][0]
    assert torch.equal(before.eval()(x), model.eval()(x))


def test_a_resumed_run_goes_on_as_it_began_whatever_is_faster_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(epoch: Any) -> None:
        if epoch.epoch == 1:
            raise KeyboardInterrupt

    config, module = TuneConfig(epochs=2, lr=0.01, autocast="off"), sys.modules["tenfold.training.finetune"]
    for faster in (True, False):
        whole, parts = small(), small()
        folder = tmp_path / str(faster)
        monkeypatch.setattr(module, "faster_as_dense", lambda *_, faster=faster: faster)
        said = finetune(whole, batches, config).config
        assert said == config.replace(train_as="dense" if faster else "factors")
        again = small()
        finetune(again, batches, said)
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
        with pytest.raises(KeyboardInterrupt):
            finetune(parts, batches, config, folder=folder, progress=TuneProgress(stop))
        stored = Snapshot(TrainingFolder(folder), config).read()
        assert stored is not None
        assert stored.state.as_dense is faster
        monkeypatch.setattr(module, "faster_as_dense", lambda *_, faster=faster: not faster)
        finetune(parts, batches, config, folder=folder)
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


def test_measuring_what_is_faster_changes_neither_model_nor_random_numbers() -> None:
    from tenfold.training.as_dense import faster_as_dense

    model = small().train()
    model.insert(3, nn.Dropout())
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert faster_as_dense(model, lambda net: net(batches()[0][0]).square().sum()) in (True, False)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert all(p.grad is None for p in model.parameters())
    assert not faster_as_dense(nn.Linear(2, 2), lambda net: pytest.fail("nothing to measure"))
