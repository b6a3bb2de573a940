"""What people call data becomes batches of inputs: labels are told from inputs, and what is no batch is made one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from tenfold.calibration import calibrate
from tenfold.errors import DataError, TenfoldWarning
from tenfold.surgery import reestimate_batchnorm_
from tenfold.tracing.input_batches import gathered, input_batches
from tenfold.tracing.inputs import call_model, describe_inputs

X, Y = torch.randn(10, 3, 4, 4), torch.arange(10) % 3
EXAMPLE = X[:4]
IDS, MASK = torch.arange(20).view(4, 5), torch.ones(4, 5).long()


class Takes(nn.Module):
    """A forward of pictures that may take more."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


class TakesTwo(Takes):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return x.flatten(1) * y.view(-1, 1)


class TakesMask(Takes):
    def forward(self, x: Tensor, mask: Tensor | None = None, features: bool = False) -> Tensor:
        return x.flatten(1) if mask is None else x.flatten(1) * mask.float().mean()


class TakesContext(Takes):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return x.flatten(1) if context is None else x.flatten(1) * context.mean()


class Words(nn.Module):
    """A forward in the manner of transformers: with labels it computes a loss."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        assert labels is None
        return input_ids if attention_mask is None else input_ids * attention_mask


class Detects(nn.Module):
    def forward(self, images: list[Tensor], targets: Any = None) -> list[Tensor]:
        assert targets is None
        return [image.mean() for image in images]


class TakesDict(nn.Module):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["x"]


class Samples(Dataset[Any]):
    """A data set of arrays with labels, as of pictures read with NumPy."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        return X[i].double().numpy(), int(Y[i])


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(zip(X, Y, strict=True))


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


def read(data: Any, model: nn.Module, example: Any) -> tuple[list[Any], str]:
    """Return the batches, which the model runs on, and what was said."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        batches = gathered(data, model, example, torch.device("cpu"))
    for batch in batches:
        call_model(model, batch)
    assert all(issubclass(w.category, TenfoldWarning) for w in said)
    return list(batches), "\n".join(str(w.message) for w in said)


@pytest.mark.parametrize(
    "data",
    [
        DataLoader(TensorDataset(X, Y), batch_size=4),
        [(X[:4], Y[:4]), (X[4:8], Y[4:8]), (X[8:], Y[8:])],
        [Pair(X[:4], Y[:4]), Pair(X[4:], Y[4:])],
        [(X.numpy(), Y.numpy())],
        [{"image": X, "label": Y}],
        [{"x": X, "targets": Y.float()}],
        [(X, Y.float().view(-1, 1))],
        [(X, torch.zeros(10, 4, 4).long())],  # a class for each pixel
        [[X, ["a", "b"]]],
        TensorDataset(X, Y),
        Samples(),
        Stream(),
        [X, Y],
        (X, Y),
    ],
    ids=lambda data: type(data).__name__,
)
@pytest.mark.parametrize("model", [Takes(), TakesMask()])
def test_labels_are_left_out_with_one_word(data: Any, model: nn.Module) -> None:
    for example in (EXAMPLE, (EXAMPLE,)):
        batches, said = read(data, model, example)
        inputs = [batch["x"] if isinstance(batch, dict) else batch for batch in batches]
        assert torch.allclose(torch.cat(inputs), X)
        assert all(batch.dtype == torch.float32 for batch in inputs)
        assert len(said.splitlines()) == 1, said


@pytest.mark.parametrize("data", [X, X.numpy(), X.double().numpy(), list(X), [x.numpy() for x in X], {"x": X}])
def test_samples_become_batches_of_the_size_of_the_example(data: Any) -> None:
    batches, said = read(data, Takes(), EXAMPLE)
    inputs = [batch["x"] if isinstance(batch, dict) else batch for batch in batches]
    assert [len(batch) for batch in inputs] == [4, 4, 2]
    assert torch.allclose(torch.cat(inputs), X)
    assert not said


def test_one_sample_as_the_example_does_not_make_batches_of_one() -> None:
    (batch,), _ = read(X, Takes(), X[:1])
    assert torch.equal(batch, X)


def test_samples_of_different_sizes_are_batches_of_one() -> None:
    batches, _ = read([torch.rand(3, 4, 4), torch.rand(3, 5, 5)], Takes(), EXAMPLE)
    assert [tuple(batch.shape) for batch in batches] == [(1, 3, 4, 4), (1, 3, 5, 5)]


@pytest.mark.parametrize(
    "data", [[X], [X.clone(), X[:3]], (batch for batch in [X]), X.view(5, 2, 3, 4, 4), [(X,)], [[X]]]
)
def test_what_are_batches_already_stays(data: Any) -> None:
    batches, said = read(data, Takes(), EXAMPLE)
    assert not said
    assert sum(len(batch[0] if isinstance(batch, tuple) else batch) for batch in batches) in {10, 13}


def test_a_second_argument_that_is_required_takes_the_second_element() -> None:
    example = (EXAMPLE, torch.ones(4))
    for data in ([[X, Y]], DataLoader(TensorDataset(X, Y), batch_size=5), [(X, Y)]):
        batches, said = read(data, TakesTwo(), example)
        assert all(len(batch) == 2 for batch in batches)
        assert not said
    ((x, y),), said = read([[X, Y.float(), Y]], TakesTwo(), example)
    assert torch.equal(y, Y.float())
    assert "element 3 (int64[10]) is left out, as labels" in said
    ((x, y),), said = read([((X, Y), torch.zeros(10))], TakesTwo(), example)  # (inputs, targets), as in training
    assert torch.equal(x, X)
    assert torch.equal(y, Y)
    for data in ([X], [[X]], X):
        with pytest.raises(DataError, match=r"the forward takes \(float32\[4, 3, 4, 4\], float32\[4\]\)"):
            read(data, TakesTwo(), example)


def test_an_optional_argument_takes_what_looks_like_it_and_that_is_said() -> None:
    mask = torch.ones(10, 3).bool()
    ((_, taken),), said = read([(X, mask)], TakesMask(), EXAMPLE)
    assert torch.equal(taken, mask)
    assert "element 2 (bool[10, 3]) is taken as 'mask'" in said
    ((_, taken),), said = read([(X, torch.rand(10, 7))], TakesContext(), EXAMPLE)
    assert "is taken as 'context'" in said
    (batch,), said = read([(X, Y)], TakesContext(), EXAMPLE)
    assert torch.equal(batch, X)
    assert "left out" in said


def test_mappings_lose_their_labels_where_the_model_would_compute_a_loss() -> None:
    example = {"input_ids": IDS[:1], "attention_mask": MASK[:1]}
    full = {"input_ids": IDS, "attention_mask": MASK}
    labels = torch.zeros(4).long()
    for data in (
        [{**full, "labels": labels}],
        [{**full, "labels": labels, "text": ["a"] * 4, "idx": labels}],
        [(full, labels)],
        [[IDS, MASK, labels]],
        [{"input_ids": IDS[i], "attention_mask": MASK[i], "labels": 1} for i in range(4)],
        {**full, "labels": labels},
    ):
        (batch,), said = read(data, Words(), example)
        assert list(batch) == ["input_ids", "attention_mask"]
        assert torch.equal(batch["input_ids"], IDS)
        assert "left out" in said
    (batch,), said = read([{**full, "labels": labels}], Words(), IDS[:1])  # the mask is taken beside the example
    assert list(batch) == ["input_ids", "attention_mask"]
    with pytest.raises(DataError, match="lacks input_ids"):
        read([{"attention_mask": MASK}], Words(), example)
    with pytest.raises(DataError, match="pass mappings with these names"):
        read([[torch.rand(3, 3), MASK]], Words(), example)


def test_lists_and_mappings_that_are_one_argument_stay_so() -> None:
    images = [torch.rand(3, 8, 8), torch.rand(3, 9, 9)]
    (batch,), said = read([images], Detects(), [images[0]])
    assert batch is not None
    assert len(batch) == 2
    assert not said
    (batch,), said = read([(tuple(images), ({"boxes": 1}, {"boxes": 2}))], Detects(), [images[0]])
    assert isinstance(batch, list)
    assert "left out, as labels" in said
    (batch,), said = read([{"x": X, "label": Y}], TakesDict(), ({"x": EXAMPLE}, {}))
    assert describe_inputs(batch) == "(dict)"
    assert "'label' is left out" in said


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("images.npz", "is a text or a path"),
        (Path("images"), "is a text or a path"),
        (7, "type int, which holds no batches"),
        (lambda: [X], "is called and not read.*or what it returns"),
        (Takes(), "is called and not read"),
        (torch.tensor(1.0), "without axes"),
        (X[0], r"a single sample without a batch axis.*\[data\[None\]\]"),
        (["some", "words"], "a batch of the data is str, without a tensor.*tokenized"),
        ([{"text": ["some", "words"]}], "has the keys text"),
        ([[1, 2, 3]], "without a tensor"),
        ([None], "without a tensor"),
        (np.array(["a", "b"]), "array of <U1"),
        ([], "the iterable is empty"),
        (iter(()), "the iterable is empty"),
    ],
)
def test_what_is_no_data_is_explained(data: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        gathered(data, Takes(), EXAMPLE, torch.device("cpu"))


class ReadsTexts(nn.Module):
    """A forward that counts letters itself."""

    def forward(self, texts: list[str]) -> Tensor:
        return torch.tensor([[float(text.count(letter)) for letter in "abcd"] for text in texts])


def test_texts_are_data_of_a_forward_that_takes_texts() -> None:
    texts = [["a cab", "dab"], ["bad", "add"]]
    (first, second), said = read(texts, ReadsTexts(), ["a"])
    assert ([first, second], said) == (texts, "")


def test_without_example_inputs_the_signature_decides() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.BatchNorm1d(8))
    known = calibrate(net, [X])["1"]
    with pytest.warns(TenfoldWarning, match="left out, as labels"):
        labelled = calibrate(net, DataLoader(TensorDataset(X, Y), batch_size=10))["1"]
    assert labelled.count == known.count
    with pytest.warns(TenfoldWarning, match="left out, as labels"):
        assert reestimate_batchnorm_(net, [(X, Y)]) == 1
    assert [len(batch) for batch in input_batches([[X, Y]], TakesTwo())] == [2]
    once = input_batches([X], Takes())
    assert input_batches(once, Takes()) is once


def test_keywords_of_the_example_are_inputs_where_the_forward_takes_any() -> None:
    class AnyKeywords(nn.Module):
        def forward(self, x: Tensor, **more: Tensor) -> Tensor:
            return x * more.get("scale", 1.0)

    batch = (torch.ones(2, 3), {"scale": torch.full((2, 1), 2.0)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (found,) = input_batches([batch], AnyKeywords(), batch)
    assert describe_inputs(found) == describe_inputs(batch) == "(float32[2, 3], scale=float32[2, 1])"
