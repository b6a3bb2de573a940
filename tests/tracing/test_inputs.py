"""Example inputs reach the model as its author meant them to."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from tenfold.errors import ProfileError
from tenfold.tracing.inputs import batch_size_of, call_model, input_shapes, tensors_in, to_device

X, Y = torch.ones(2, 3), torch.full((2, 3), 5.0)
Pair = namedtuple("Pair", "left right")  # noqa: PYI024


class Echo(nn.Module):
    """Returns what it was called with."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs


PACKED = pack_padded_sequence(torch.ones(2, 4, 3), torch.tensor([4, 2]), batch_first=True)


@pytest.mark.parametrize(
    ("inputs", "args", "kwargs"),
    [
        (X, (X,), {}),
        ((X, Y), (X, Y), {}),
        ((X,), (X,), {}),
        ((), (), {}),
        ({"a": X, "b": 3}, (), {"a": X, "b": 3}),
        ((X, {"b": Y}), (X,), {"b": Y}),
        (((X, Y), {"b": 1}), (X, Y), {"b": 1}),
        (((), {"b": 1}), (), {"b": 1}),
        ((X, {"b": Y}, {}), (X, {"b": Y}), {}),
        ([X, Y], ([X, Y],), {}),
        (([X, Y],), ([X, Y],), {}),
        (PACKED, (PACKED,), {}),
        (Pair(X, Y), (Pair(X, Y),), {}),
        (((PACKED), {"b": 1}), (PACKED,), {"b": 1}),
        ("text", ("text",), {}),
    ],
    ids=str,
)
def test_arguments_are_passed_as_meant(inputs: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    got_args, got_kwargs = call_model(Echo(), inputs)
    assert len(got_args) == len(args)
    assert all(a is b or str(a) == str(b) for a, b in zip(got_args, args, strict=True))
    assert got_kwargs == kwargs
    assert list(map(type, got_args)) == list(map(type, args))


def test_a_failing_forward_names_model_shapes_and_cause() -> None:
    with pytest.raises(
        ProfileError, match=r"Linear does not run on inputs \(float32\[2, 3\]\): RuntimeError: .*mat1"
    ) as e:
        call_model(nn.Linear(4, 4), X)
    assert "\n" not in str(e.value)
    assert isinstance(e.value.__cause__, RuntimeError)
    with pytest.raises(ProfileError, match="list is passed as one argument"):
        call_model(nn.Linear(3, 4), [X, Y])
    with pytest.raises(ProfileError, match=r"extra=int"):
        call_model(nn.Linear(3, 4), (X, {"extra": 3}))


@pytest.mark.parametrize(
    ("inputs", "size"),
    [
        (torch.ones(7, 2), 7),
        ((1.0, {"x": torch.ones(5)}), 5),
        ([torch.ones(3, 8, 8), torch.ones(3, 9, 9)], 2),
        (PACKED, 2),
        (torch.tensor(1.0), None),
        ({}, None),
    ],
)
def test_batch_size(inputs: Any, size: int | None) -> None:
    assert batch_size_of(inputs) == size


def test_to_device_changes_tensors_and_keeps_everything_else() -> None:
    inputs = (X, [Pair(Y, 3)], PACKED, {"ids": torch.zeros(2, dtype=torch.long), "name": "a", "none": None})
    moved = to_device(inputs, "cpu", torch.float64)
    assert [t.dtype for t in tensors_in(moved)] == [torch.float64] * 3 + [torch.int64]
    assert isinstance(moved[1][0], Pair)
    assert isinstance(moved[2], PackedSequence)
    assert moved[3]["name"] == "a"
    assert X.dtype == torch.float32
    assert to_device(PACKED, "cpu", torch.float64).data.dtype == torch.float64
    assert to_device(X, "meta").is_meta


def test_shapes_are_listed_in_order() -> None:
    def identity(x: Tensor) -> Tensor:
        return x

    assert input_shapes((X, {"y": [identity(Y), torch.ones(())]})) == ((2, 3), (2, 3), ())


class InPlace(nn.Module):
    """Changes what it is given."""

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        assert other is None or other is x
        return x.mul_(2).sum()


def test_a_forward_may_change_its_inputs_in_place() -> None:
    x = torch.ones(2, 3)
    with torch.no_grad():
        assert call_model(InPlace(), x) == call_model(InPlace(), x) == 12
        assert call_model(InPlace().eval(), (x, {"other": x})) == 12
        with torch.inference_mode():
            made = torch.ones(2, 3)
        assert call_model(InPlace(), {"x": made}) == 12
    assert torch.equal(x, torch.ones(2, 3))
    assert torch.equal(made, torch.ones(2, 3))


def test_gradients_pass_to_the_inputs() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    for model in (nn.Linear(3, 1).eval(), nn.Linear(3, 1).train()):
        (gradient,) = torch.autograd.grad(call_model(model, x).sum(), x)
        assert torch.equal(gradient, model.weight.detach().expand(2, 3))
    with torch.no_grad():
        assert call_model(Echo().eval(), x)[0][0].requires_grad


class OneDict(nn.Linear):
    """Takes a dict as its one argument."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return super().forward(batch["x"])


def test_a_dict_that_was_meant_as_one_argument_is_told_how_to_pass_it() -> None:
    model = OneDict(3, 2)
    for inputs in ({"x": X}, ({"x": X},)):
        with pytest.raises(ProfileError, match=r"put an empty one behind it: \(d, \{\}\)"):
            call_model(model, inputs)
    assert torch.equal(call_model(model, ({"x": X}, {})), model({"x": X}))


def test_inputs_of_another_type_than_the_model_are_told_which() -> None:
    with pytest.raises(ProfileError, match=r"the model is in torch\.bfloat16: give inputs in that type"):
        call_model(nn.Linear(3, 2).bfloat16(), X)
    with pytest.raises(ProfileError) as caught:
        call_model(nn.Linear(4, 2), X)
    assert "in that type" not in str(caught.value)
