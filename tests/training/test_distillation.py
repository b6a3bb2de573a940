"""The loss against its formula, training by answers alone, and answers that are asked for once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.errors import CheckpointError, DataError, TuningError
from tenfold.training import CachedLogits, Distillation, TuneConfig, finetune

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
Y = X[:, :3].argmax(1)


def net(seed: int, width: int = 8) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))


def batches(epoch: int) -> list[tuple[Tensor, Tensor]]:
    order = torch.randperm(64, generator=torch.Generator().manual_seed(epoch)).split(16)
    return [(X[i], Y[i]) for i in order]


def test_the_loss_is_its_formula() -> None:
    teachers, student = [net(0), net(1)], net(2)
    t, share = 3.0, 0.7
    probabilities = torch.stack([(m.eval()(X) / t).softmax(1) for m in teachers]).mean(0)
    logits = student(X)
    kl = (probabilities * (probabilities.log() - (logits / t).log_softmax(1))).sum(1).mean()
    wanted = (1 - share) * F.cross_entropy(logits, Y, label_smoothing=0.1) + share * t * t * kl
    student = net(2)  # its batch norm has seen nothing yet
    found = Distillation(teachers, share=share, temperature=t, label_smoothing=0.1)(student, X, Y)
    torch.testing.assert_close(found, wanted)


def test_features_are_compared_where_they_are_named() -> None:
    teacher, student = net(0), net(1)
    plain = Distillation(teacher, share=1.0)(copy.deepcopy(student), X, None)
    tapped = Distillation(teacher, share=1.0, features="0,2", feature_weight=2.0)(copy.deepcopy(student), X, None)

    def features(model: nn.Sequential) -> list[Tensor]:
        first = model[0](X)
        return [F.normalize(f, dim=1) for f in (first, model[2](model[1](first)))]

    apart = [(s - f).square().sum(1).mean() for s, f in zip(features(student), features(teacher.eval()), strict=True)]
    torch.testing.assert_close(tapped - plain, 2.0 * sum(apart) / 2)


def test_teachers_stay_as_they_are_and_get_no_gradient() -> None:
    teacher, student = net(0).train(), net(1)
    before = copy.deepcopy(teacher.state_dict())
    Distillation(teacher, features=["0"])(student, X, Y).backward()
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(m.training for m in teacher.modules())
    assert not any(m._forward_hooks for m in (*teacher.modules(), *student.modules()))


def test_learns_without_labels() -> None:
    teacher, student = net(0).eval(), net(1, width=12)
    unlabeled = [(x, None) for x in X.split(16)]
    loss = Distillation(teacher, share=1.0)
    finetune(student, unlabeled, TuneConfig(epochs=60, lr=0.1), loss=loss)
    agree = (student.eval()(X).argmax(1) == teacher(X).argmax(1)).float().mean()
    assert agree > 0.9


def test_stored_answers_train_as_the_teacher_does(tmp_path: Path) -> None:
    teacher = net(0).eval()
    students = [net(1), net(1), net(1)]
    config = TuneConfig(epochs=3, lr=0.05, autocast="off")
    finetune(students[0], lambda epoch: batches(epoch % 2), config, loss=Distillation(teacher))
    answers = CachedLogits(teacher, batches, tmp_path, views=2)
    finetune(students[1], answers, config, loss=Distillation(None))
    assert len(list(tmp_path.iterdir())) == 2
    finetune(students[2], CachedLogits(teacher, batches, tmp_path, views=2), config, loss=Distillation(None))
    for live, stored in zip(students[0].parameters(), students[1].parameters(), strict=True):
        torch.testing.assert_close(stored, live, atol=1e-3, rtol=1e-2)  # answers are kept in half precision
    for first, again in zip(students[1].parameters(), students[2].parameters(), strict=True):
        assert torch.equal(first, again)  # computed or read: the same bits


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError


def test_teachers_are_not_asked_again(tmp_path: Path) -> None:
    answers = CachedLogits(net(0), batches, tmp_path, views=1)
    first = list(answers(0))
    answers.teachers = (Fails(),)
    again = list(answers(7))
    assert all(torch.equal(a[1][1], b[1][1]) for a, b in zip(first, again, strict=True))


def test_an_epoch_cut_short_leaves_nothing(tmp_path: Path) -> None:
    answers = CachedLogits(net(0), batches, tmp_path / "answers", views=1)
    next(iter(answers(0)))
    assert not (tmp_path / "answers").exists()
    assert len(answers(0)) == 4


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"teacher": []}, "no teacher"),
        ({"teacher": net(0), "share": 1.2}, "share=1.2"),
        ({"teacher": net(0), "temperature": 0.5}, "temperature=0.5"),
        ({"teacher": net(0), "features": ["layer9"]}, "no module 'layer9'"),
        ({"teacher": None, "features": ["0"]}, "pass the teacher"),
    ],
)
def test_says_what_is_wrong(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(TuningError, match=words):
        Distillation(**wrong)


def test_says_what_is_wrong_with_answers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one"):
        CachedLogits(net(0), batches, tmp_path, views=0)
    with pytest.raises(TuningError, match="CachedLogits"):
        Distillation(None)(net(0), X, Y)
    with pytest.raises(TuningError, match=r"\(64, 8\) in the student and \(64, 12\)"):
        Distillation(net(0, width=12), features=["0"])(net(1), X, Y)
    list(CachedLogits(net(0), batches, tmp_path, views=1)(0))
    half = CachedLogits(net(0), lambda epoch: batches(epoch)[:2], tmp_path, views=1)
    with pytest.raises(CheckpointError, match="about"):
        list(half(0))
    (stored,) = tmp_path.iterdir()
    stored.write_bytes(b"no safetensors")
    with pytest.raises(CheckpointError, match="delete it"):
        list(CachedLogits(net(0), batches, tmp_path, views=1)(0))
