"""A stack of linear layers answers for the parameter that it stands for, in every product that models write."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tenfold.layers import FactorizedLayer, StackedLinear, stacked_parameters
from tenfold.records import LayerSpec

COUNT, OUT, IN = 4, 8, 12
X = torch.randn(7, IN, generator=torch.Generator().manual_seed(0))
ROUTED = torch.tensor([0, 3, 3, 1, 0, 0, 3])
PAIRS = torch.tensor([[0, 1], [3, 1], [3, 0], [1, 3], [0, 1], [0, 3], [3, 0]])
ENDS = torch.tensor([3, 4, 4, 7], dtype=torch.int32)

# From a parameter (count, out, in) to a value, and how many of its matrices are multiplied with.
PRODUCTS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "one": (lambda w: functional.linear(X, w[2], torch.ones(OUT)), 1),
    "by a tensor": (lambda w: functional.linear(X, w[torch.tensor(2)]), 1),
    "transposed": (lambda w: X @ w[1].T, 1),
    "a vector": (lambda w: w[1] @ X[0], 1),
    "three axes": (lambda w: X[None] @ w[3].mT, 1),
    "addmm": (lambda w: torch.addmm(torch.ones(OUT), X, w[0].t()), 1),
    "in a loop": (lambda w: torch.cat([functional.linear(X, matrix) for matrix in w]), 4),
    "unbound": (lambda w: torch.cat([functional.linear(X, matrix) for matrix in w.unbind(0)[1:]]), 3),
    "in the same dtype": (lambda w: X @ w.to(torch.float32)[0].float().contiguous().T, 1),
    "for all rows": (lambda w: X @ w.transpose(-2, -1), 4),
    "for own rows": (lambda w: torch.bmm(X.expand(COUNT, -1, -1), w.permute(0, 2, 1)), 4),
    "in batches": (lambda w: torch.stack([X, -X])[:, None] @ w.mT, 4),
    "a vector with all": (lambda w: w @ X[0], 4),
    "picked": (lambda w: torch.bmm(w[ROUTED], X.unsqueeze(-1)).squeeze(-1), 3),
    "picked rows": (lambda w: (X[:, None] @ w.index_select(0, ROUTED).mT)[:, 0], 3),
    "picked in pairs": (lambda w: torch.einsum("nd,nkfd->nkf", X, w[PAIRS]), 3),
    "by a mask": (lambda w: X @ w[torch.tensor([True, False, True, False])].mT, 2),
    "some": (lambda w: X @ w[1:3].mT, 2),
    "grouped": (lambda w: functional.grouped_mm(X, w.transpose(-2, -1), offs=ENDS), 3),
    "einsum": (lambda w: torch.einsum("nd,efd->nef", X, w), 4),
    "grouped in another order": (
        lambda w: functional.grouped_mm(X, w[torch.tensor([2, 1, 3, 0])].transpose(-2, -1), offs=ENDS),
        3,
    ),
    "einsum of the last axes": (lambda w: torch.einsum("...d,efd->...ef", torch.stack([X, X]), w), 4),
    "einsum of one": (lambda w: torch.einsum("b n d, f d -> b n f", X[None], w[1]), 1),
    "summed": (lambda w: torch.einsum("end,efd->nf", X.expand(COUNT, -1, -1), w), 4),
}
READS: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda w: 2 * w + w / 3 - w * w,
    "as what is added": lambda w: torch.addmm(w[0], torch.ones(OUT, 3), torch.ones(3, IN)),
    "into another tensor": lambda w: torch.mm(X, w[0].detach().t(), out=torch.empty(7, OUT)),
    "implicitly": lambda w: torch.einsum("nd,efd", X, w),
    "from the other side": lambda w: torch.ones(5, OUT) @ w[1],
    "in another dtype": lambda w: X.double() @ w[0].double().T,
    "parts of matrices": lambda w: X @ w[:, :3].mT,
    "several at once": lambda w: torch.einsum("nd,efd,e->nf", X, w, torch.ones(COUNT)),
    "as a convolution": lambda w: functional.conv1d(torch.ones(1, OUT, 20), w),
}


@pytest.fixture
def weight() -> nn.Parameter:
    return nn.Parameter(torch.randn(COUNT, OUT, IN, generator=torch.Generator().manual_seed(1)))


def stack_of(weight: Tensor, *, transposed: bool = False) -> tuple[StackedLinear, list[int]]:
    """Return a copy of a stack, and the numbers of rows with which its layers are called from now on."""
    stack = copy.deepcopy(StackedLinear(weight, transposed=transposed))
    rows: list[int] = []
    for layer in stack.children():
        layer.register_forward_pre_hook(lambda _, args: rows.append(args[0].numel() // args[0].shape[-1]))
    return stack, rows


@pytest.mark.parametrize("transposed", [False, True], ids=["(out, in)", "(in, out)"])
@pytest.mark.parametrize(("product", "multiplied"), PRODUCTS.values(), ids=PRODUCTS)
def test_products_run_the_layers(
    weight: nn.Parameter, product: Callable[[Tensor], Tensor], multiplied: int, transposed: bool
) -> None:
    given = nn.Parameter(weight.detach().mT.contiguous()) if transposed else weight
    stack, rows = stack_of(given, transposed=transposed)
    wanted = product(given.mT if transposed else given)
    found = product(stack.mT if transposed else stack)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert len(rows) == multiplied
    assert all(rows)
    gradient = torch.autograd.grad(wanted.square().sum(), given)[0]
    found.square().sum().backward()
    layers: list[nn.Linear] = list(stack.children())  # type: ignore[arg-type]
    for layer, own in zip(layers, gradient.mT if transposed else gradient, strict=True):
        assert torch.allclose(torch.zeros_like(own) if layer.weight.grad is None else layer.weight.grad, own, atol=1e-4)


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_anything_else_is_computed_with_the_entries(weight: nn.Parameter, read: Callable[[Tensor], Tensor]) -> None:
    stack, rows = stack_of(weight)
    assert torch.allclose(read(stack), read(weight), atol=1e-5)  # type: ignore[arg-type]
    assert rows == []


def test_rows_beyond_the_last_group_are_not_multiplied(weight: nn.Parameter) -> None:
    stack, rows = stack_of(weight)
    found = functional.grouped_mm(X, stack.mT, offs=ENDS - 2 * (ENDS == 7))
    assert torch.equal(found[5:], torch.zeros(2, OUT))
    assert rows == [3, 1, 1]


def test_no_rows_run_nothing(weight: nn.Parameter) -> None:
    stack, rows = stack_of(weight)
    assert (X[:0, None] @ stack[ROUTED[:0]].mT).shape == (0, 1, OUT)
    assert rows == []


def test_a_factorized_matrix_is_one_of_the_stack(weight: nn.Parameter) -> None:
    stack, _ = stack_of(weight)
    layer = FactorizedLayer.empty(_spec(), "low_rank", {"rank": 2}, weight)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    stack.add_module("1", layer)
    dense = torch.stack([weight[0], layer.weight, weight[2], weight[3]])
    assert torch.allclose((X[:, None] @ stack[ROUTED].mT)[:, 0], (X[:, None] @ dense[ROUTED].mT)[:, 0], atol=1e-5)
    assert torch.allclose(stack + 0, dense)


def test_a_stack_has_the_face_of_its_parameter_and_stays_a_module(weight: nn.Parameter) -> None:
    stack, _ = stack_of(weight)
    assert (stack.shape, stack.dtype, stack.dim(), len(stack)) == (weight.shape, weight.dtype, 3, COUNT)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = stack.nothing_like_it
    assert [name for name, _ in stack.named_parameters()] == [f"{n}.weight" for n in range(COUNT)]
    file = io.BytesIO()
    torch.save(StackedLinear(weight).state_dict(), file)
    assert len(file.getvalue()) < 4 * weight.numel() + 4000  # each layer holds its own matrix alone


def test_layers_of_torch_stack_no_matrices() -> None:
    class Own(nn.Conv1d):
        pass

    assert stacked_parameters(nn.Bilinear(2, 3, 4)) == {}
    assert list(stacked_parameters(Own(2, 3, 4))) == ["weight"]


def _spec() -> LayerSpec:
    return LayerSpec(kind="linear", in_channels=IN, out_channels=OUT)
