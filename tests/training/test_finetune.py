"""The loop trains, leaves the model as it found it but for the weights, and says clearly what is wrong."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tenfold.errors import DataError, ProfileError, TenfoldError, TuningError
from tenfold.training import EpochRecord, TuneConfig, TuneProgress, finetune
from tenfold.training.optimizer import learning_rate
from tenfold.training.precision import channels_last_weights, uses_bf16, uses_channels_last

PLAIN = TuneConfig(epochs=2, autocast="off", channels_last=False, warmup=0, weight_decay=0, clip_norm=None)


def blobs(n: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Four classes around four corners."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 4, (n,), generator=generator)
    x = torch.stack([y % 2, y // 2], 1) * 4.0 + torch.randn(n, 2, generator=generator) * 0.3
    return x, y


def batches(epoch: int) -> list[tuple[Tensor, Tensor]]:
    x, y = blobs()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(epoch)).split(16)
    return [(x[i], y[i]) for i in order]


def mlp() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 4))


def accuracy(model: nn.Module) -> float:
    assert not model.training
    assert not torch.is_grad_enabled()
    x, y = blobs(200, seed=7)
    return (model(x).argmax(1) == y).float().mean().item()


def test_frozen_norms_keep_their_statistics_and_train_their_scales() -> None:
    model, modes = mlp(), []
    norm, dropout = model[1], model[3]
    before = {k: v.clone() for k, v in norm.state_dict().items()}

    def loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        modes.append((norm.training, dropout.training))
        return F.cross_entropy(model(inputs), targets)

    finetune(model, batches, PLAIN.replace(freeze_norms=True), loss=loss)
    assert set(modes) == {(False, True)}
    assert all(torch.equal(norm.state_dict()[k], before[k]) == (k.startswith(("running", "num"))) for k in before)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_learns(optimizer: str) -> None:
    model = mlp()
    config = TuneConfig(epochs=12, lr=0.1 if optimizer == "sgd" else 0.03, optimizer=optimizer, label_smoothing=0.05)
    result = finetune(model, batches, config, evaluate=accuracy)
    assert result.score > 0.95
    assert [r.epoch for r in result.history] == list(range(1, 13))
    assert result.history[-1].loss < result.history[0].loss
    assert result.history[-1].lr < 0.01 * config.lr
    assert result.resumed == 0
    assert result.seconds > 0


def test_equals_a_plain_torch_loop() -> None:
    ours, theirs = mlp(), mlp()
    config = PLAIN.replace(lr=0.05, warmup=0.25, weight_decay=0.01, clip_norm=0.5, label_smoothing=0.1)
    ours[3].p = theirs[3].p = 0.0
    result = finetune(ours, batches, config)

    decay = [theirs[0].weight, theirs[4].weight]
    rest = [p for p in theirs.parameters() if all(p is not d for d in decay)]
    optimizer = torch.optim.SGD(
        [{"params": decay, "weight_decay": 0.01}, {"params": rest}], lr=1.0, momentum=0.9, nesterov=True
    )
    step, means = 0, []
    for epoch in range(2):
        losses = []
        for x, y in batches(epoch):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, 8, peak=0.05, warmup=0.25)
            loss = F.cross_entropy(theirs(x), y, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
            optimizer.step()
            losses.append(loss.item())
            step += 1
        means.append(sum(losses) / len(losses))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert [r.loss for r in result.history] == pytest.approx(means, rel=1e-5)


def test_model_is_left_as_it_was_but_for_its_weights() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(16, 2)).eval()
    model[1].train()
    model[0].bias.requires_grad_(False)
    bias, strides = model[0].bias.clone(), [p.stride() for p in model.parameters()]
    x, y = torch.randn(8, 1, 4, 4), torch.randint(0, 2, (8,))
    random_state = torch.random.get_rng_state()
    finetune(model, [(x, y)], PLAIN.replace(channels_last=True))
    assert torch.equal(random_state, torch.random.get_rng_state())
    assert [m.training for m in model] == [False, True, False, False, False]
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True, True, True]
    assert torch.equal(model[0].bias, bias)
    assert [p.stride() for p in model.parameters()] == strides
    assert all(p.grad is None for p in model.parameters())


def test_same_seed_same_bytes_and_other_seed_other_bytes() -> None:
    def weights(seed: int) -> Tensor:
        model = mlp()
        torch.manual_seed(torch.seed())  # the global state does not matter
        loader = DataLoader(TensorDataset(*blobs()), batch_size=16, shuffle=True)
        finetune(model, loader, TuneConfig(epochs=2, seed=seed))
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_generators_are_counted_once_and_epochs_are_told_apart() -> None:
    asked: list[int] = []

    def generate(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        asked.append(epoch)
        yield from batches(epoch)

    seen: list[EpochRecord] = []
    one, other = mlp(), mlp()
    result = finetune(one, generate, PLAIN, progress=TuneProgress(seen.append))
    assert asked == [0, 0, 1]
    assert tuple(seen) == result.history
    finetune(other, batches, PLAIN)
    assert torch.equal(one[0].weight, other[0].weight)


def test_own_loss_and_inputs_of_any_shape() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bilinear = nn.Bilinear(2, 2, 1)

        def forward(self, a: Tensor, *, b: Tensor) -> Tensor:
            return self.bilinear(a, b)

    def loss(model: nn.Module, inputs: Any, targets: Any) -> Tensor:
        assert targets is None
        return model(inputs[0][0], **inputs[1]).square().mean()

    model = Two()
    x = torch.randn(16, 2)
    result = finetune(model, [(((x,), {"b": x}), None)], PLAIN.replace(epochs=20, lr=0.05), loss=loss)
    assert result.history[-1].loss < 0.1 * result.history[0].loss


def test_zero_epochs_do_nothing() -> None:
    def never(epoch: int) -> list[tuple[Tensor, Tensor]]:
        raise AssertionError

    assert finetune(mlp(), never, TuneConfig(epochs=0)).history == ()


def test_progress_is_told_of_everything_and_stopped_on_errors() -> None:
    class Diary(TuneProgress):
        def __init__(self, on_epoch: Any = None) -> None:
            super().__init__(on_epoch)
            self.lines: list[Any] = []

        def start(self, *, epochs: int, steps: int, done: int) -> None:
            self.lines.append((epochs, steps, done))

        def advance(self, loss: Tensor) -> None:
            self.lines.append("step")

        def end_epoch(self, record: EpochRecord) -> None:
            self.lines.append(record.epoch)
            super().end_epoch(record)

        def stop(self) -> None:
            self.lines.append("stop")

    diary = Diary()
    finetune(mlp(), batches, PLAIN, progress=diary)
    assert diary.lines == [(2, 4, 0), *["step"] * 4, 1, *["step"] * 4, 2, "stop"]

    def interrupt(_: EpochRecord) -> None:
        raise KeyboardInterrupt

    diary, model = Diary(interrupt), mlp().eval()
    with pytest.raises(KeyboardInterrupt):
        finetune(model, batches, PLAIN, progress=diary)
    assert diary.lines[-2:] == [1, "stop"]
    assert not any(m.training for m in model.modules())


X, Y = blobs(8)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], DataError, "no batches"),
        (lambda epoch: [(X, Y)] if epoch == 0 else [], DataError, "no batches"),
        (iter([(X, Y)]), DataError, "one epoch at most"),
        (3, DataError, "type int"),
        ([X], DataError, "pair"),
        ([(X, Y, Y)], DataError, "tuple of 3"),
        ([(X * float("nan"), Y)], TuningError, "loss is nan in epoch 1, step 1"),
        ([(torch.randn(8, 5), Y)], ProfileError, r"\[8, 5\]"),
    ],
)
def test_bad_data(data: Any, error: type[TenfoldError], message: str) -> None:
    with pytest.raises(error, match=message):
        finetune(mlp(), data, PLAIN)


def test_divergence_and_nothing_to_train() -> None:
    # The last step breaks the weights after a finite loss: only the weights show it.
    model = nn.Linear(2, 4)
    with pytest.raises(TuningError, match=r"'weight' is not finite after epoch 1"):
        finetune(model, [(X, Y)], PLAIN.replace(lr=1e38), loss=lambda m, x, y: 1e3 * m(x).square().mean())
    with pytest.raises(TuningError, match="requires grad"):
        finetune(mlp().requires_grad_(False), batches)


@pytest.mark.parametrize(
    "field", [{"lr": 0}, {"epochs": -1}, {"warmup": 1}, {"optimizer": "lion"}, {"clip_norm": 0}, {"lrr": 1}]
)
def test_config_is_checked(field: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        TuneConfig(**field)
    with pytest.raises(TenfoldError, match=next(iter(field))):
        TuneConfig.from_text(str(field))


def test_learning_rate_rises_then_falls() -> None:
    rates = [learning_rate(s, 100, peak=2.0, warmup=0.1) for s in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[9] == rates[10] == 2.0
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert 0 < rates[-1] < 0.01
    assert learning_rate(500, 100, peak=2.0, warmup=0.1) == rates[-1]
    assert learning_rate(0, 1, peak=2.0, warmup=0.0) == 2.0


class Flat(nn.Module):
    """Flattens with view, which the channels-last layout does not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.out = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.out(x.view(x.shape[0], -1))


def test_channels_last_is_tried_before_it_is_used() -> None:
    x, y = torch.randn(8, 3, 4, 4), torch.randint(0, 2, (8,))
    good = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).train()
    strides = good[0].weight.stride()
    assert uses_channels_last(good, x, "auto")
    assert good.training
    assert good[0].weight.stride() == strides
    assert not uses_channels_last(Flat(), x, "auto")
    assert not uses_channels_last(nn.Linear(4, 2), x, "auto")
    assert len(finetune(Flat(), [(x, y)], TuneConfig(epochs=1)).history) == 1
    with pytest.raises(ProfileError, match="view"):
        finetune(Flat(), [(x, y)], TuneConfig(epochs=1, channels_last=True))


def test_layout_changes_strides_and_not_values() -> None:
    conv = nn.Conv2d(3, 4, 3)
    values, strides = conv.weight.detach().clone(), conv.weight.stride()
    with channels_last_weights(conv):
        assert conv.weight.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(conv.weight, values)
        conv.weight.data.add_(1)
    assert conv.weight.stride() == strides
    assert torch.equal(conv.weight, values + 1)


def test_bf16_only_where_the_hardware_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, model = torch.device("cpu"), nn.Linear(2, 2)
    for native in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
        assert uses_bf16(model, cpu, "auto") is native
        assert not uses_bf16(nn.Linear(2, 2).double(), cpu, "auto")
        assert uses_bf16(model, cpu, "bf16")
        assert not uses_bf16(model, cpu, "off")


def test_autocast_reaches_the_loss_and_weights_stay_float32() -> None:
    seen = []

    def loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        output = model(inputs)
        seen.append(output.dtype)
        return F.cross_entropy(output.float(), targets)

    model = mlp()
    finetune(model, batches, PLAIN.replace(autocast="bf16", epochs=1), loss=loss)
    finetune(model, batches, PLAIN.replace(epochs=1), loss=loss)
    assert seen == [torch.bfloat16] * 4 + [torch.float32] * 4
    assert model[0].weight.dtype == torch.float32


def test_any_other_loop_does_as_well() -> None:
    model = mlp().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for epoch in range(15):
        for x, y in batches(epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        assert accuracy(model) > 0.95
