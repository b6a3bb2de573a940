"""compress() takes models whatever their forward does, and leaves them as they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tenfold import Runtime, compress, decompose, finetune, profile
from tenfold.errors import ProfileError
from tenfold.training import TuneConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::tenfold.errors.CalibrationWarning"),
]

X = torch.randn(256, 12, generator=torch.Generator().manual_seed(3))
QUIET = Runtime(measure=False)


def net(first=None):
    torch.manual_seed(2)
    return nn.Sequential(first or nn.Linear(12, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 4)).eval()


def body():
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(12, 48), nn.BatchNorm1d(48)).eval()


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        return self.net(x)


class Forces(Own):
    create_graph = False

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.net(x).sum(1)
            return energy, -torch.autograd.grad(energy.sum(), x, create_graph=self.create_graph)[0]


class DifferentiableForces(Forces):
    create_graph = True


class Backward(Own):
    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            self.net(x).sum().backward()
        return -x.grad


class Mapped(Own):
    def forward(self, x):
        return torch.func.vmap(self.net)(x)


class Jacobian(Own):
    def forward(self, x):
        return torch.func.vmap(torch.func.jacrev(self.net))(x)


class Keeping(Own):
    def forward(self, x):
        self.hidden = self.net[:2](x)
        return self.net[2:](self.hidden)


class Checkpointed(Own):
    def forward(self, x):
        return self.net[3:](checkpoint(self.net[2], self.net[:2](x), use_reentrant=True))


class Random(Own):
    def forward(self, x):
        return self.net(x + torch.randn(()))


FORWARDS = {
    "forces": Forces,
    "forces with a graph": DifferentiableForces,
    "backward in the forward": Backward,
    "vmap": Mapped,
    "jacrev": Jacobian,
    "feature maps kept": Keeping,
    "random numbers": Random,
    "reentrant checkpoint": Checkpointed,
    "scripted part": lambda: net(torch.jit.script(body())),
    "traced part": lambda: net(torch.jit.trace(body(), X[:2])),
    "frozen part": lambda: net(torch.jit.freeze(torch.jit.script(body()))),
}


@pytest.mark.parametrize("method", ["none", "independent", "sequential", "batchnorm"])
@pytest.mark.parametrize("build", FORWARDS.values(), ids=FORWARDS)
def test_any_forward(build, method):
    model = build().train()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    recipe = {"budget": {"params": 0.7}, "calibration": {"method": method}, "fuse_batchnorm": True}
    small = compress(model, X[:2], recipe, data=[X[:128], X[128:]], runtime=QUIET)
    assert small.record.after.params < 0.75 * small.record.before.params
    assert all(p.is_leaf and p.requires_grad for p in small.model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.training


def test_macs_include_those_of_gradients_and_layers_are_still_theirs():
    plain, forces = profile(net(), X[:5]), profile(Forces(), X[:5])
    assert [layer.macs for layer in forces.layers] == [layer.macs for layer in plain.layers]
    assert forces.macs == 2 * plain.macs  # a gradient for the input of a linear layer takes as much as its output
    assert not any(layer.read for layer in forces.layers)


@pytest.mark.parametrize("what", ["grad", "backward"])
def test_a_forward_that_wants_gradients_of_the_caller_is_told_so(what):
    class Wants(Own):
        def forward(self, x):
            x = x.detach().requires_grad_()
            energy = self.net(x).sum()
            return energy.backward() if what == "backward" else torch.autograd.grad(energy, x)[0]

    with pytest.raises(ProfileError, match=r"no_grad.*enable_grad") as error:
        compress(Wants(), X[:2], "params=0.5", runtime=QUIET)
    assert "\n" not in str(error.value)


def test_an_error_names_the_layer_that_it_comes_from():
    model = nn.Sequential(nn.Linear(12, 8), nn.Sequential(nn.Linear(9, 8)))
    with pytest.raises(ProfileError, match=r"in layer '1\.0': RuntimeError: mat1"):
        profile(model, X[:2])


@pytest.mark.parametrize("where", ["model", "data", "inputs", "all", "inside"])
def test_inference_mode(where):
    def run(model, inputs, batches):
        recipe = {"budget": {"params": 0.6}}
        tune = lambda small: finetune(small, [(X, X[:, 0].long().clamp(0, 3))], TuneConfig(epochs=1))  # noqa: E731
        return compress(model, inputs, recipe, data=batches, tune=None if where == "inside" else tune, runtime=QUIET)

    model, inputs, batches = net(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(12, 48))), X[:2].clone(), [X.clone()]
    wanted = run(model, inputs, batches)
    with torch.inference_mode():
        if where in ("model", "all"):
            model = net(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(12, 48)))
        if where in ("inputs", "all"):
            inputs = X[:2].clone()
        if where in ("data", "all"):
            batches = [X.clone()]
        if where == "inside":
            found = run(model, inputs, batches)
    if where != "inside":
        found = run(model, inputs, batches)
    assert [layer.rank for layer in found.plan.layers] == [layer.rank for layer in wanted.plan.layers]
    assert not any(t.is_inference() for t in found.model.state_dict().values())
    assert all(p.is_inference() == (where in ("model", "all")) for p in model.parameters())
    found.model(X).sum().backward()


@pytest.mark.parametrize("method", ["none", "independent", "sequential"])
def test_a_script_under_autocast_gets_the_same_weights(method):
    def run(enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            recipe = {"budget": {"params": 0.6}, "calibration": {"method": method}}
            return compress(net(), X[:2], recipe, data=[X], runtime=QUIET)

    plain, cast = run(enabled=False), run(enabled=True)
    for one, other in zip(plain.plan.layers, cast.plan.layers, strict=True):
        assert one.rank == other.rank
        if one.rel_error is not None:
            assert other.rel_error == pytest.approx(one.rel_error, rel=0.05)  # activations are in bfloat16
    if method == "none":
        states = zip(plain.model.state_dict().values(), cast.model.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in states)


@pytest.mark.parametrize(
    ("format", "rank", "shape"),
    [("low_rank", {"rank": 24}, (24, 32)), ("tucker2", {"out": 8, "in": 8}, (8, 8, 3, 3)), ("cp3", {}, (4, 4, 3, 3))],
)
def test_fits_are_the_same_bits_under_autocast(format, rank, shape):
    weight = torch.randn(shape)
    plain = decompose(weight, format, rank)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        cast = decompose(weight, format, rank)
    assert cast.rel_error == plain.rel_error
    assert all(torch.equal(t, cast.value.tensors()[name]) for name, t in plain.value.tensors().items())


CONV = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
DATA = {
    "ones": torch.ones(16, 3, 6, 6),
    "zeros": torch.zeros(16, 3, 6, 6),
    "one image": X[:1, :3, None, None].expand(16, 3, 6, 6),
    "huge": torch.randn(16, 3, 6, 6) * 1e20,
    "tiny": torch.randn(16, 3, 6, 6) * 1e-20,
}


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("method", ["independent", "sequential"])
@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_any_finite_data_give_a_result(data, method):
    model = nn.Sequential(*CONV).eval()
    recipe = {"budget": {"macs": 0.6}, "calibration": {"method": method}}
    small = compress(model, data[:1], recipe, data=[data] * 2, runtime=QUIET)
    assert torch.isfinite(small.model(data)).all()
    assert small.record.after.macs <= 0.6 * small.record.before.macs
