"""What is written to the weight of a factorized layer would be lost, so it is an error; reading goes on as before."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune

import tenfold
from tenfold.errors import WeightError
from tenfold.layers import FactorizedLayer
from tenfold.runtime import Runtime


@pytest.fixture
def small() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 40)).eval()
    found = tenfold.compress(
        net, torch.zeros(1, 32), {"budget": "params=0.5", "keep_ends": False}, runtime=Runtime(measure=False)
    ).model
    assert isinstance(found, nn.Sequential)
    assert isinstance(found[2], FactorizedLayer)
    return found


def assign_item(w: Tensor) -> None:
    w[0] = 0


def assign_data(w: Tensor) -> None:
    w.data = torch.zeros(40, 48)


def assign_grad(w: Tensor) -> None:
    w.grad = torch.zeros(40, 48)


def freeze(w: Tensor) -> None:
    w.requires_grad = False


WRITES: dict[str, Callable[[Tensor], object]] = {
    "data add": lambda w: w.data.add_(1),
    "data": assign_data,
    "data normal": lambda w: w.data.normal_(),
    "data copy": lambda w: w.data.copy_(torch.zeros(40, 48)),
    "data item": lambda w: assign_item(w.data),
    "item": assign_item,
    "clamp": lambda w: w.clamp_(-1, 1),
    "copy": lambda w: w.copy_(torch.zeros(40, 48)),
    "lerp": lambda w: w.lerp_(torch.zeros(40, 48), 0.5),
    "detach": lambda w: w.detach().mul_(2),
    "view": lambda w: w.view(-1).zero_(),
    "row": lambda w: w[0].zero_(),
    "transpose": lambda w: w.T.zero_(),
    "chunk": lambda w: w.chunk(2)[1].zero_(),
    "rows": lambda w: [row.zero_() for row in w],
    "view of a view of data": lambda w: w.data.T[3:].narrow(1, 2, 4).squeeze().fill_(1),
    "masked fill": lambda w: w.masked_fill_(torch.ones(40, 48, dtype=torch.bool), 0),
    "out": lambda w: torch.zeros(40, 48, out=w),
    "foreach": lambda w: torch._foreach_add_([w], 1.0),
    "kaiming": nn.init.kaiming_uniform_,
    "orthogonal": nn.init.orthogonal_,
    "truncated normal": nn.init.trunc_normal_,
    "freeze": freeze,
    "freeze by method": lambda w: w.requires_grad_(requires_grad=False),
    "gradient": assign_grad,
    "hook": lambda w: w.register_hook(lambda grad: grad * 2),
    "parameter of it": lambda w: nn.Parameter(w.data),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_writing_is_refused(write: str, mode: Callable[[], object], small: nn.Sequential) -> None:
    before = copy.deepcopy(small.state_dict())
    with mode(), pytest.raises((WeightError, RuntimeError), match=r"computed from its factors|modified inplace"):  # type: ignore[attr-defined]
        WRITES[write](small[2].weight)
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())


def test_adding_in_place_is_refused_as_adapters_do_it(small: nn.Sequential) -> None:
    with pytest.raises(WeightError, match=r"densify\(model\)"):
        small[2].weight.data += torch.ones(40, 48)
    with torch.no_grad(), pytest.raises(WeightError):
        small[2].weight += 1


READS: dict[str, Callable[[Tensor], object]] = {
    "transpose": lambda w: w.T,
    "linear": lambda w: functional.linear(torch.ones(3, 48), w),
    "norm": lambda w: w.norm(),
    "row": lambda w: w[3],
    "copy of it": lambda w: torch.zeros(40, 48).copy_(w),
    "average": lambda w: torch.ones(40, 48).lerp_(w, 0.25),
    "stack of rows": lambda w: torch.stack(list(w)),
    "singular values": lambda w: torch.linalg.svdvals(w.data),
    "double": lambda w: w.double(),
    "same dtype": lambda w: w.float(),
    "array": lambda w: torch.from_numpy(w.detach().numpy()),
    "clone": lambda w: w.detach().clone().add_(1),
    "parameter of a clone": lambda w: nn.Parameter(w.detach().clone()),
    "deep copy": lambda w: copy.deepcopy(w.detach()),
    "pickle": lambda w: pickle.loads(pickle.dumps(w.detach())),  # noqa: S301
    "vmap": lambda w: torch.func.vmap(lambda v: w @ v)(torch.ones(3, 48)),
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_reading_gives_what_the_product_gives(read: str, mode: Callable[[], object], small: nn.Sequential) -> None:
    layer = small[2]
    with mode():  # type: ignore[attr-defined]
        assert torch.equal(READS[read](layer.weight), READS[read](layer.factorization().to_dense()))


def test_gradients_pass_through_views(small: nn.Sequential) -> None:
    layer = small[2]
    layer.weight.T[1:].square().sum().backward()
    found = [stage.weight.grad.clone() for stage in layer.stages]
    layer.zero_grad()
    layer.factorization().to_dense().T[1:].square().sum().backward()
    assert all(torch.equal(stage.weight.grad, grad) for stage, grad in zip(layer.stages, found, strict=True))


def test_compiled_and_exported_models_read_the_weight(small: nn.Sequential) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = small

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) / self.body[2].weight.norm()  # type: ignore[no-any-return]

    net, x = Normed().eval(), torch.randn(4, 32)
    torch.testing.assert_close(torch.compile(net, backend="eager")(x), net(x))
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), net(x))


def test_other_parameters_are_refused(small: nn.Sequential) -> None:
    layer = small[2]
    with pytest.raises(WeightError, match="takes no 'weight'"):
        layer.weight = nn.Parameter(torch.zeros(40, 48))
    with pytest.raises(WeightError, match="takes no 'bias'"):
        layer.bias = nn.Parameter(torch.zeros(40))
    with pytest.raises(WeightError, match="takes no 'weight_orig'"):
        prune.l1_unstructured(layer, "weight", 0.5)
    with pytest.raises(ValueError, match="does not have a parameter"):
        parametrizations.weight_norm(layer)
    with pytest.raises(ValueError, match="non-leaf"):
        torch.optim.SGD([layer.weight], 0.1)


@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_a_dense_layer_are_not_taken_for_factors(strict: bool, small: nn.Sequential) -> None:
    dense = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 40))
    with pytest.raises(RuntimeError, match=r"2\.weight is of a dense layer, and low_rank factors stand here"):
        small.load_state_dict(dense.state_dict(), strict=strict)


def test_the_state_of_a_factorized_layer_loads(small: nn.Sequential) -> None:
    twin = copy.deepcopy(small)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.load_state_dict(small.state_dict())
    assert torch.equal(twin(torch.ones(1, 32)), small(torch.ones(1, 32)))
