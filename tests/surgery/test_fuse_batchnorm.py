"""Fusing batch norm must change no output, and must leave alone what it cannot merge, with the reason."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tenfold
from tenfold.errors import CheckpointError, PlanError
from tenfold.layers import FactorizedLayer
from tenfold.planning import plan
from tenfold.profiling import profile
from tenfold.surgery import (
    FusedNorm,
    apply,
    densify,
    fusable_pairs,
    fuse_batchnorm,
    fuse_batchnorm_,
    fuse_pairs_,
    fused_pairs,
)


def awake_(model, seed=0):
    """Give every batch norm statistics and weights that would be missed, in place; return the model in eval mode."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.copy_(torch.randn(module.num_features, generator=draw))
                module.running_var.copy_(torch.rand(module.num_features, generator=draw) + 0.3)
                if module.affine:
                    module.weight.copy_(torch.randn(module.num_features, generator=draw))
                    module.bias.copy_(torch.randn(module.num_features, generator=draw))
    return model.eval()


def norms_in(model):
    return [path for path, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


PAIRS = [
    (nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), (2, 6, 7, 5)),
    (nn.Conv2d(6, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8, affine=False), (2, 6, 7, 5)),
    (nn.Conv2d(6, 8, (3, 1), groups=2, padding="same", padding_mode="reflect"), nn.BatchNorm2d(8), (2, 6, 7, 5)),
    (nn.Conv2d(6, 6, 3, groups=6, bias=False), nn.BatchNorm2d(6, eps=0.1), (2, 6, 7, 5)),
    (nn.Conv1d(6, 8, 3, dilation=2), nn.BatchNorm1d(8), (2, 6, 9)),
    (nn.Conv3d(4, 6, 3, padding=1), nn.BatchNorm3d(6), (2, 4, 3, 4, 5)),
    (nn.Linear(6, 8), nn.BatchNorm1d(8), (3, 6)),
    (nn.Linear(6, 8, bias=False), nn.SyncBatchNorm(8), (3, 6)),
    (nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1), nn.BatchNorm2d(8), (2, 6, 4, 5)),
    (nn.ConvTranspose2d(6, 8, 3, groups=2, bias=False), nn.BatchNorm2d(8), (2, 6, 4, 5)),
    (nn.ConvTranspose1d(6, 9, 4, stride=3, groups=3), nn.BatchNorm1d(9), (2, 6, 5)),
]


@pytest.mark.parametrize(("layer", "norm", "shape"), PAIRS, ids=lambda v: str(v) if isinstance(v, nn.Module) else "")
@pytest.mark.parametrize("format", ["dense", "low_rank", "tucker2", "spatial"])
def test_outputs_stay_and_the_batch_norm_goes(layer, norm, shape, format):
    model = awake_(nn.Sequential(copy.deepcopy(layer), copy.deepcopy(norm), nn.ReLU())).double()
    x = torch.randn(shape, dtype=torch.float64)
    if format != "dense":
        whole = profile(model, x)
        made = plan(model, whole, {"rule": {"name": "ratio", "share": 0.6}, "formats": [format], "keep_ends": False})
        if not made.factorized:
            pytest.skip(made.layers[0].reason)
        model = apply(model, made)
    fused = fuse_batchnorm(model, x)
    assert fused_pairs(fused) == {"1": "0"}
    assert not norms_in(fused)
    with torch.no_grad():
        assert float((fused(x) - model(x)).abs().max()) < 1e-10
    assert norms_in(model) == ["1"]
    if format != "dense":
        assert isinstance(fused[0], FactorizedLayer)
        assert fused[0].spec.bias
        assert profile(fused, x).layer("0").params == sum(p.numel() for p in fused[0].parameters())
        with torch.no_grad():
            torch.testing.assert_close(densify(fused)(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_smaller_dtypes_stay_what_they_are(dtype, near):
    model = awake_(nn.Sequential(nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8))).to(dtype)
    model[0].to(memory_format=torch.channels_last)
    x = torch.randn(2, 6, 7, 5).to(dtype)
    fused = fuse_batchnorm(model, x)
    assert {p.dtype for p in fused.parameters()} == {dtype}
    assert fused[0].weight.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        wanted = copy.deepcopy(model).double()(x.double())
        error = (fused(x).double() - wanted).norm() / wanted.norm()
    assert float(error) < near


class Odd(nn.Module):
    """Everything that a batch norm can meet and that must keep it where it is."""

    def __init__(self):
        super().__init__()
        self.conv = nn.ModuleDict({n: nn.Conv2d(4, 4, 1) for n in ("used", "twice", "changed", "out", "hooked")})
        self.norm = nn.ModuleDict({n: nn.BatchNorm2d(4) for n in (*self.conv, "sum", "shared", "idle")})
        self.norm["blind"] = nn.BatchNorm2d(4, track_running_stats=False)
        self.blind, self.flat, self.on_axis = nn.Conv2d(4, 4, 1), nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.tied = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)])
        self.tied[1].weight = self.tied[0].weight
        self.after_tied = nn.BatchNorm2d(4)
        self.conv["hooked"].register_forward_hook(lambda *_: None)

    def forward(self, x):
        y = self.conv["used"](x)
        x = self.norm["used"](y) + y
        x = self.norm["twice"](self.conv["twice"](self.conv["twice"](x)))
        y = self.conv["changed"](x)
        y += 1
        x = self.norm["changed"](y)
        x = self.norm["sum"](self.norm["hooked"](self.conv["hooked"](x)) + x)
        x = self.norm["shared"](self.norm["shared"](x))
        x = self.norm["blind"](self.blind(x))
        x = self.after_tied(self.tied[1](self.tied[0](x)))
        x = self.on_axis(self.flat(x.flatten(2))).view_as(x)
        y = self.conv["out"](x)
        return {"before": y, "after": self.norm["out"](y)}


def test_what_cannot_be_merged_stays_with_the_reason():
    model = awake_(Odd()).double()
    x = torch.randn(2, 4, 2, 2, dtype=torch.float64)
    found = fusable_pairs(model, x)
    assert found.pairs == {}
    expected = {
        "norm.used": "used elsewhere",
        "norm.twice": "several times",
        "norm.changed": "used elsewhere as well, or changed",
        "norm.out": "used elsewhere",
        "norm.hooked": "has hooks",
        "norm.sum": "not the output of a layer",
        "norm.shared": "not the output of a layer|several times",
        "norm.idle": "never calls it",
        "norm.blind": "no running statistics",
        "after_tied": "shares a parameter with tied.0",
        "on_axis": "another axis",
    }
    assert set(found.kept) == set(expected)
    for path, reason in found.kept.items():
        assert any(part in reason for part in expected[path].split("|")), (path, reason)
    before = model(x)
    assert fuse_batchnorm_(model, x) == found
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


def test_training_mode_is_refused_and_a_training_norm_kept():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(PlanError, match=r"call model\.eval\(\) first"):
        fuse_batchnorm(model, x)
    model.eval()[1].train()
    assert "training mode" in fusable_pairs(model, x).kept["1"]


def test_what_overflows_stays():
    model = awake_(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=0.0))).half()
    model[1].running_var.fill_(6e-8)
    model[1].weight.data.fill_(6e4)
    found = fuse_batchnorm_(model, torch.zeros(1, 3, 2, 2).half())
    assert "does not fit into the dtype" in found.kept["1"]
    assert norms_in(model) == ["1"]


def zoo(name):
    from benchmarks.zoo import build, supply_torchvision_ops

    if name != "vgg":
        return build(f"torchvision:{name}", size=32).model
    supply_torchvision_ops()
    vgg = pytest.importorskip("torchvision.models.vgg")
    return vgg.make_layers([8, "M", 16, 16, "M"], batch_norm=True)


@pytest.mark.parametrize("name", ["resnet18", "vgg", "mobilenet_v2", "mobilenet_v3_small"])
def test_networks_of_torchvision_lose_all_their_batch_norms(name):
    pytest.importorskip("torchvision")
    model, x = awake_(zoo(name)).double(), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    fused = fuse_batchnorm(model, x)
    assert not norms_in(fused)
    with torch.no_grad():
        wanted = model(x)
        assert float((fused(x) - wanted).abs().max()) < 1e-10 * max(float(wanted.abs().max()), 1)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_activations_of_timm_stay(name):
    from benchmarks.zoo import supply_torchvision_ops

    supply_torchvision_ops()
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, pretrained=False, num_classes=5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(0.7)
    model, x = model.eval().double(), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    fused = fuse_batchnorm(model, x)
    assert not norms_in(fused)
    with torch.no_grad():
        wanted = model(x)
        assert float((fused(x) - wanted).abs().max()) < 1e-10 * max(float(wanted.abs().max()), 1)


def small_net():
    torch.manual_seed(0)
    head = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
    return awake_(nn.Sequential(*head, nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Flatten())).double()


def test_a_fused_model_is_saved_loaded_profiled_and_made_dense(tmp_path):
    model, x = small_net(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    made = plan(model, profile(model, x), {"rule": {"name": "ratio", "share": 0.5}, "keep_ends": False})
    small = apply(model, made)
    fused = fuse_batchnorm(small, x)
    tenfold.save(fused, made, tmp_path / "fused")
    with torch.device("meta"):
        skeleton = small_net_on_meta()
    loaded, told = tenfold.load(skeleton, tmp_path / "fused")
    assert told.fused == {"1": "0", "4": "3"}
    assert told.factorized == made.factorized
    assert torch.equal(loaded(x), fused(x))
    assert profile(loaded, x).params == sum(p.numel() for p in fused.parameters())
    with pytest.raises(CheckpointError, match="fused, the model does not"):
        tenfold.save(small, told, tmp_path / "other")
    again = apply(model, told)  # the plan as it was saved does all of it
    torch.testing.assert_close(again(x), fused(x), rtol=1e-9, atol=1e-9)


def small_net_on_meta():
    head = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
    model = nn.Sequential(*head, nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Flatten()).eval()
    return model.double()


def test_a_fused_model_can_be_compressed_further(tmp_path):
    model, x = (
        fuse_batchnorm(small_net(), torch.zeros(1, 3, 6, 6).double()),
        torch.randn(2, 3, 6, 6, dtype=torch.float64),
    )
    made = plan(model, profile(model, x), {"rule": {"name": "ratio", "share": 0.5}, "keep_ends": False})
    small = apply(model, made)
    tenfold.save(small, made, tmp_path / "small")
    loaded, _ = tenfold.load(small_net(), tmp_path / "small")
    assert torch.equal(loaded(x), small(x))
    assert [type(m) for m in loaded] == [type(m) for m in small]


def test_pairs_that_do_not_fit_leave_the_model_alone():
    model = small_net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for pairs, message in (
        ({"1": "0", "2": "3"}, "not a batch norm"),
        ({"1": "0", "4": "5"}, "cannot be fused into '5'"),
        ({"1": "0", "4": "conv"}, "no layer 'conv'"),
    ):
        with pytest.raises(PlanError, match=message):
            fuse_pairs_(model, pairs)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert isinstance(fuse_pairs_(model, {"1": "0"})[1], FusedNorm)
    assert fused_pairs(fuse_pairs_(model, {"1": "0"})) == {"1": "0"}
