"""Statistics are those of the plain forward, whatever the forward does besides and whatever surrounds the caller."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tenfold.calibration import calibrate
from tenfold.calibration.collect import collect_moments
from tenfold.decompositions import Moments
from tenfold.errors import CalibrationWarning, DataError
from tenfold.records import LayerSpec


class Net(nn.Module):
    """Three layers, of which subclasses run those inside in their own way."""

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def within(self, h):
        return torch.tanh(self.inner(h))

    def forward(self, x):
        return self.last(self.within(torch.tanh(self.first(x))))


class Reentrant(Net):
    def within(self, h):
        return checkpoint(super().within, h, use_reentrant=True)


class NonReentrant(Net):
    def within(self, h):
        return checkpoint(super().within, h, use_reentrant=False)


class FirstCheckpointed(Net):
    def forward(self, x):  # nothing that enters it requires a gradient
        return self.last(self.within(checkpoint(lambda v: torch.tanh(self.first(v)), x, use_reentrant=True)))


class Keywords(Net):
    def forward(self, x):
        return self.last(input=torch.tanh(self.inner(input=torch.tanh(self.first(input=x)))))


class Keeping(Net):
    def within(self, h):
        self.map = super().within(h)
        return self.map


class Recurring(Net):
    state = None

    def within(self, h):  # refers to the graph of the batch before
        out = super().within(h)
        _ = out if self.state is None else out + self.state
        self.state = out
        return out


def like(kind, model=None):
    torch.manual_seed(1)
    net = kind()
    if model is not None:
        net.load_state_dict(model.state_dict())
    return net


BATCHES = [torch.randn(40, 6, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def assert_same(found, wanted, rtol=1e-5, names=("input_second_moment", "mean", "output_gram")):
    assert found.keys() == wanted.keys()
    for path, own in found.items():
        assert own.count == wanted[path].count
        for name in names:
            torch.testing.assert_close(getattr(own, name), getattr(wanted[path], name), rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("kind", [Reentrant, NonReentrant, FirstCheckpointed, Keywords, Keeping, Recurring])
def test_ways_to_run_the_same_layers(kind):
    plain, other = like(Net), like(kind)
    # What remembers the batch before takes batches of one size: no part of them can be held out to judge.
    names = ("input_second_moment", "mean", *(() if kind is Recurring else ("output_gram",)))
    assert_same(calibrate(other, BATCHES), calibrate(plain, BATCHES), names=names)
    kept = [value for value in vars(other).values() if isinstance(value, torch.Tensor)]
    assert not any(value.requires_grad for value in kept)


def test_everything_in_inference_mode():
    model = like(Net)
    wanted = calibrate(model, BATCHES)
    with torch.inference_mode():
        made, batches = like(Net), [batch + 0 for batch in BATCHES]
        inside = calibrate(model, BATCHES)
    for found in (inside, calibrate(made, BATCHES), calibrate(model, batches), calibrate(made, batches)):
        assert_same(found, wanted)
    assert all(p.is_inference() and p.requires_grad for p in made.parameters())


@pytest.mark.parametrize("device_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", ["outside", "inside"])
def test_inputs_are_measured_in_float32_under_autocast(where, device_dtype):
    model, x = nn.Sequential(nn.Linear(6, 3)), torch.randn(500, 6) + 30

    def forward(model, batch):
        with torch.autocast("cpu", device_dtype):
            return model(batch)

    if where == "inside":
        found = collect_moments(model, [x], forward=forward)["0"]
    else:
        with torch.autocast("cpu", device_dtype):
            found = collect_moments(model, [x])["0"]
    torch.testing.assert_close(found.covariance(), Moments.of(x).covariance(), rtol=1e-3, atol=1e-3)


class Mapped(Net):
    def forward(self, x):
        return torch.func.vmap(super().forward)(x)


class MappedOverTheSecondAxis(Net):
    def forward(self, x):
        return torch.func.vmap(super().forward, in_dims=1, out_dims=1)(x[:, None].transpose(0, 1)[0][None])[0]


@pytest.mark.parametrize("kind", [Mapped, MappedOverTheSecondAxis])
def test_samples_of_vmap_are_rows(kind):
    plain = collect_moments(like(Net), BATCHES)
    found = collect_moments(like(kind), BATCHES)
    for path, own in found.items():
        assert own.count == plain[path].count
        torch.testing.assert_close(own.input_second_moment, plain[path].input_second_moment, rtol=1e-5, atol=1e-6)


def test_maps_of_vmap_are_samples():
    conv, x = nn.Conv2d(2, 3, 3, padding=1), torch.randn(5, 4, 2, 6, 6)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv

        def forward(self, x):
            return torch.func.vmap(self.conv)(x)

    for positions in (None, 7):
        found = collect_moments(Model(), [x], positions=positions)["conv"]
        wanted = collect_moments(conv, [x.flatten(0, 1)], positions=positions)[""]
        assert found.count == wanted.count
        torch.testing.assert_close(found.input_second_moment, wanted.input_second_moment)


class Forces(Net):
    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = super().forward(x).sum(-1)
            return energy, -torch.autograd.grad(energy.sum(), x)[0]


class ForcesByTransform(Net):
    def forward(self, x):
        return torch.func.vmap(torch.func.grad(lambda v: Net.forward(self, v).sum()))(x)


class NotFinite(Net):
    def forward(self, x):
        out = super().forward(x)
        return out + (out - out).sqrt()  # its gradient at 0 is infinite, and cancels


@pytest.mark.parametrize("kind", [Forces, ForcesByTransform, NotFinite])
def test_layers_count_alike_where_gradients_cannot_be_taken(kind):
    model = like(kind)
    with pytest.warns(CalibrationWarning, match="equally important") as told:
        found = calibrate(model, BATCHES)
    assert all("\n" not in str(w.message) for w in told)
    assert all(own.output_gram is None and own.count == 120 for own in found.values())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_random_numbers_of_the_caller_go_on_as_before():
    model, state = nn.Sequential(nn.Linear(6, 3), Noise()), torch.get_rng_state()
    calibrate(model, BATCHES)
    assert torch.equal(torch.get_rng_state(), state)


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


@pytest.mark.parametrize("scale", [1e-25, 1e-18, 1e18, 1e25])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 3, bias=False), (50, 6)),
        (nn.Conv2d(2, 3, 3, padding=1, bias=False), (3, 2, 6, 6)),
        (nn.Conv1d(2, 3, 3, bias=False), (5, 2, 9)),
    ],
    ids=lambda v: str(v) if isinstance(v, nn.Module) else "",
)
def test_moments_of_huge_and_tiny_inputs(layer, shape, scale):
    x = torch.randn(shape)
    found, wanted = (collect_moments(layer, [x * s], dense=layer)[""] for s in (scale, 1.0))
    for name, power in (("input_second_moment", 2), ("mean", 1), ("cross", 2), ("target_power", 2)):
        scaled = getattr(found, name) / scale**power
        torch.testing.assert_close(scaled, getattr(wanted, name), rtol=1e-4, atol=1e-5)


def test_sketches_and_later_batches_may_be_huge():
    small, huge = torch.randn(30, 12), torch.randn(30, 12) * 1e20
    found = collect_moments(nn.Linear(12, 3), [small, huge], widest=4)[""]
    assert torch.isfinite(found.covariance().dense()).all()
    exact = collect_moments(nn.Linear(12, 3), [small, huge])[""]
    torch.testing.assert_close(
        found.covariance().diagonal(), exact.covariance().diagonal(dim1=1, dim2=2), rtol=1e-4, atol=0
    )


def test_squares_beyond_float64_are_said_to_be_what_they_are():
    with pytest.raises(DataError, match="layer '' is so large that its squares overflow"):
        collect_moments(nn.Linear(2, 3).double(), [torch.full((4, 2), 1e200, dtype=torch.float64)])
    with pytest.raises(DataError, match="layer '' is not finite"):
        collect_moments(nn.Linear(2, 3), [torch.full((4, 2), torch.inf)])


def test_what_goes_wrong_in_a_hook_names_the_layer():
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 3))
    model[1].register_forward_pre_hook(lambda module, args: (args[0].to_sparse(),))
    with pytest.raises(DataError, match="input of layer '1' cannot be measured: ") as error:
        collect_moments(model, [torch.randn(5, 4)])
    assert "\n" not in str(error.value)
    assert not model[1]._forward_hooks


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.scores, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    def forward(self, x, key_padding_mask=None):
        return self.out(self.scores(x, x, x, key_padding_mask=key_padding_mask, need_weights=False)[0])


def test_padding_is_left_out_of_everything():
    model, x = Attention(), torch.randn(5, 6, 8)
    specs = {"out": LayerSpec(kind="linear", in_channels=8, out_channels=8)}
    padding = torch.arange(6) >= torch.tensor([[2], [6], [4], [3], [5]])
    noisy = torch.where(padding[..., None], torch.full_like(x, 1e3), x)
    for mask in (padding, torch.zeros(5, 6).masked_fill(padding, -torch.inf)):
        clean, dirty = (calibrate(model, [(v, {"key_padding_mask": mask})], specs)["out"] for v in (x, noisy))
        assert clean.count == 20
        torch.testing.assert_close(clean.input_second_moment, dirty.input_second_moment)
        torch.testing.assert_close(clean.output_gram, dirty.output_gram)
