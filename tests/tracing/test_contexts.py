"""What runs a model under observation leaves nothing behind, however it ends."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils import checkpoint

from tenfold.calibration.gradients import GradientSums
from tenfold.records import LayerSpec
from tenfold.tracing.contexts import evaluating, layer_by_layer
from tenfold.tracing.observing import observing
from tenfold.tracing.trace import Tracer


class Checkpointed(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.body, self.how, self.runs = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), how, 0
        self.body.register_forward_hook(self.count)

    def count(self, *_):
        self.runs += 1

    def forward(self, x):
        match self.how:
            case "sequential":
                return checkpoint.checkpoint_sequential(self.body, 2, x, use_reentrant=True)
            case "nested":
                return checkpoint.checkpoint(lambda v: checkpoint.checkpoint(self.body, v, use_reentrant=True), x)
            case _:
                return checkpoint.checkpoint(self.body, x, use_reentrant=self.how)


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint")
@pytest.mark.parametrize("how", [True, False, "sequential", "nested"])
def test_checkpoints_run_once_and_give_gradients(how):
    model, x = Checkpointed(how), torch.randn(2, 4, requires_grad=True)
    before = vars(checkpoint).copy()
    with layer_by_layer():
        (gradient,) = torch.autograd.grad(model(x).sum(), [x])
    assert model.runs == (0 if how == "sequential" else 1)  # it calls the parts of the body
    torch.testing.assert_close(gradient, torch.autograd.grad(model.body(x).sum(), [x])[0])
    assert vars(checkpoint) == before


def test_checkpoints_are_back_after_an_interruption():
    before = vars(checkpoint).copy()
    with pytest.raises(KeyboardInterrupt), layer_by_layer(), layer_by_layer():
        raise KeyboardInterrupt
    assert vars(checkpoint) == before


class Backward(nn.Module):
    """Takes forces with ``backward``, which adds to the gradients of the parameters as well."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 1)

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            self.net(x).sum().backward()
        return -x.grad


def test_gradients_of_parameters_are_as_before():
    model = Backward()
    model.net.weight.grad = torch.full((1, 3), 7.0)
    kept = model.net.weight.grad
    with evaluating(model):
        model(torch.ones(2, 3))
    assert model.net.weight.grad is kept
    assert torch.equal(kept, torch.full((1, 3), 7.0))
    assert model.net.bias.grad is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_frozen_scripted_parts_have_no_mode_to_restore():
    model = nn.Sequential(torch.jit.freeze(torch.jit.script(nn.Linear(3, 3).eval())), nn.Dropout()).train()
    with evaluating(model):
        assert not model[1].training
    assert model[1].training


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_hooks_are_gone_however_the_forward_ends(error):
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    specs = {"0": LayerSpec(kind="linear", in_channels=3, out_channels=3)}
    for watch in (Tracer(dict(model.named_modules())), observing((), lambda: 0.0), GradientSums(model, specs)):
        with pytest.raises(error), watch:
            raise error
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
