from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from tenfold.errors import DataError, ProfileError, UnknownNameError
from tenfold.tasks import InMemoryTask, TensorSet, Transform, accuracy


class Noisy(Transform):
    """Augmentation adds noise below a half, so that rounding tells which sample it was."""

    def prepare(self, inputs: Tensor) -> Tensor:
        return inputs

    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        return inputs + 0.4 * torch.rand(inputs.shape, generator=generator)


class Numbers(InMemoryTask):
    """Sample i is the number i; its label is i modulo 5."""

    name = "numbers"
    variants = ("small", "large")
    input_shape = (1,)
    transform: ClassVar[Transform] = Noisy()
    reads = 0

    def architecture(self) -> nn.Module:
        return nn.Sequential(nn.Linear(1, 5), nn.Dropout(0.5))

    def pretrained(self) -> nn.Module:
        return self.build()

    def read(self, split: str) -> TensorSet:
        self.reads += 1
        numbers = torch.arange(100 if split == "train" else 40)
        return TensorSet(numbers[:, None].float(), numbers % 5)


def _ids(batches) -> list[int]:
    return [int(x) for batch in batches for x in (batch if isinstance(batch, Tensor) else batch[0]).floor().flatten()]


def test_making_a_task_and_its_example_inputs_reads_nothing() -> None:
    task = Numbers("large", seed=3)
    assert torch.equal(task.example_inputs(4), task.example_inputs(4))
    assert task.example_inputs(4).shape == (4, 1)
    task.build()
    assert task.reads == 0
    task.train_batches(0, batch_size=8, seed=0)
    task.train_batches(1, batch_size=8, seed=0)
    assert task.reads == 1


def test_variant_defaults_to_the_first_and_unknown_ones_are_refused() -> None:
    assert (Numbers().id, Numbers("large").id) == ("numbers:small", "numbers:large")
    with pytest.raises(UnknownNameError, match=r"no variant 'lage'. Did you mean large"):
        Numbers("lage")


def test_build_is_seeded_in_eval_mode_and_leaves_torchs_random_numbers_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, same, other = Numbers(seed=1).build(), Numbers(seed=1).build(), Numbers(seed=2).build()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one[0].weight, same[0].weight)
    assert not torch.equal(one[0].weight, other[0].weight)
    assert not one.training


def test_train_batches_are_one_epoch_of_everything_and_labels_follow() -> None:
    batches = Numbers().train_batches(0, batch_size=32, seed=0)
    assert (len(batches), batches.samples) == (4, 100)
    assert [len(y) for _, y in batches] == [32, 32, 32, 4]
    assert sorted(_ids(batches)) == list(range(100))
    for inputs, labels in batches:
        assert torch.equal(inputs.floor().flatten().long() % 5, labels)


def test_train_batches_depend_on_seed_and_epoch_alone() -> None:
    def epoch(epoch: int, seed: int) -> Tensor:
        return torch.cat([x for x, _ in Numbers().train_batches(epoch, batch_size=10, seed=seed)])

    batches = Numbers().train_batches(2, batch_size=10, seed=1)
    first, again = (torch.cat([x for x, _ in batches]) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(first, epoch(2, 1))
    assert not torch.equal(first.floor(), epoch(1, 1).floor())
    assert not torch.equal(first.floor(), epoch(2, 2).floor())
    assert not torch.equal(epoch(1, 2).floor(), epoch(2, 1).floor())
    assert not torch.equal(first, first.floor()), "augmentation did nothing"


def test_validation_part_is_disjoint_from_calibration_and_fixed() -> None:
    held = _ids(Numbers().validation_batches(batch_size=7))
    assert len(held) == 10
    assert _ids(Numbers(seed=9).validation_batches(batch_size=3)) == held
    for seed in range(5):
        calibration = _ids(Numbers().calibration_batches(90, batch_size=16, seed=seed))
        assert set(calibration) | set(held) == set(range(100))
        assert not set(calibration) & set(held)
        assert set(_ids(Numbers().validation_batches(4, batch_size=2, seed=seed))) < set(held)
    assert not set(_ids(Numbers().train_batches(0, batch_size=16, seed=0, hold_out=True))) & set(held)


def test_calibration_is_a_seeded_choice_not_augmented_and_can_be_gone_through_again() -> None:
    batches = Numbers().calibration_batches(20, batch_size=8, seed=0)
    assert [len(x) for x in batches] == [8, 8, 4]
    assert (len(batches), batches.samples) == (3, 20)
    assert all(torch.equal(x, x.floor()) for x in batches)
    assert _ids(batches) == _ids(batches) == _ids(Numbers().calibration_batches(20, batch_size=5, seed=0))
    assert _ids(batches) != _ids(Numbers().calibration_batches(20, batch_size=8, seed=1))
    assert len(set(_ids(batches))) == 20


@pytest.mark.parametrize("samples", [0, -1, 91])
def test_impossible_number_of_calibration_samples_names_what_there_is(samples: int) -> None:
    with pytest.raises(DataError, match=f"{samples} samples asked for; .* numbers .* has 90. Ask for 1 to 90"):
        Numbers().calibration_batches(samples, batch_size=8, seed=0)


def test_batch_size_must_be_positive() -> None:
    with pytest.raises(DataError, match="batch_size=0"):
        Numbers().train_batches(0, batch_size=0, seed=0)


def test_test_batches_are_the_whole_set_in_order_or_a_fixed_choice() -> None:
    assert _ids(Numbers().test_batches(batch_size=16)) == list(range(40))
    some = _ids(Numbers().test_batches(10, batch_size=16))
    assert len(set(some)) == 10
    assert some != list(range(10))
    assert some == _ids(Numbers(seed=4).test_batches(10, batch_size=3))
    assert sorted(_ids(Numbers().test_batches(1000, batch_size=16))) == list(range(40))


def test_empty_or_unlabelled_data_is_refused() -> None:
    with pytest.raises(DataError, match="0 samples"):
        TensorSet(torch.empty(0, 3), torch.empty(0))
    with pytest.raises(DataError, match="one label for each"):
        TensorSet(torch.empty(4, 3), torch.empty(3))


class Modulo5(nn.Module):
    """Knows the answer for the first ``known`` numbers, and is wrong on the rest."""

    def __init__(self, known: int) -> None:
        super().__init__()
        self.known, self.drop = known, nn.Dropout(0.9)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == self.scale.dtype
        wrong = (x.flatten() >= self.known).long()
        return self.drop(nn.functional.one_hot((x.flatten().long() + wrong) % 5, 5) * self.scale)


def test_evaluate_is_the_fraction_correct_over_uneven_batches_and_restores_modes() -> None:
    model = Modulo5(known=30).train()
    model.drop.eval()
    seen: list[tuple[int, int]] = []
    assert Numbers().evaluate(model, batch_size=16, progress=lambda *x: seen.append(x)) == 30 / 40
    assert seen == [(16, 40), (32, 40), (40, 40)]
    assert model.training
    assert not model.drop.training
    assert all(p.requires_grad for p in model.parameters())


def test_evaluate_casts_inputs_to_the_models_dtype_and_knows_its_splits() -> None:
    assert Numbers().evaluate(Modulo5(known=100).double(), limit=7) == 1.0
    held = _ids(Numbers().validation_batches(batch_size=10))
    expected = sum(i < 30 for i in held) / 10
    assert Numbers().evaluate(Modulo5(known=30), split="validation") == expected
    with pytest.raises(DataError, match=r"unknown split 'train'. Known: test, validation"):
        Numbers().evaluate(Modulo5(30), split="train")


def test_evaluate_restores_modes_after_a_failure() -> None:
    model = nn.Sequential(nn.Linear(3, 5)).train()
    with pytest.raises(ProfileError, match="does not run on inputs"):
        Numbers().evaluate(model)
    assert model.training


def test_accuracy_takes_inputs_and_outputs_of_other_kinds() -> None:
    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    class Named(nn.Module):
        def forward(self, ids: Tensor, mask: Tensor) -> Output:
            return Output(nn.functional.one_hot(ids, 4) * mask[:, None])

    inputs = {"ids": torch.tensor([3, 1, 2]), "mask": torch.ones(3)}
    assert accuracy(Named(), [(inputs, torch.tensor([3, 1, 0]))]) == 2 / 3
    with pytest.raises(DataError, match="no sample"):
        accuracy(Named(), [])
