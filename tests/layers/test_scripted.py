"""Compressed models can be scripted, as the dense ones can."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tenfold
from tenfold.formats import FORMATS
from tenfold.layers import FactorizedLayer, spec_of
from tenfold.runtime import Runtime

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")

LAYERS: dict[str, tuple[nn.Module, torch.Tensor]] = {
    "linear": (nn.Linear(24, 24), torch.randn(3, 24)),
    "batches of rows": (nn.Linear(24, 24), torch.randn(2, 5, 24)),
    "convolution": (nn.Conv2d(8, 8, 3, padding=1), torch.randn(2, 8, 6, 6)),
    "groups": (nn.Conv2d(8, 8, 3, groups=2, bias=False), torch.randn(2, 8, 6, 6)),
    "pointwise": (nn.Conv2d(8, 8, 1), torch.randn(2, 8, 6, 6)),
    "one axis": (nn.Conv1d(8, 8, 3), torch.randn(2, 8, 9)),
    "transposed": (nn.ConvTranspose2d(8, 6, 3, stride=2), torch.randn(2, 8, 5, 5)),
    "embedding": (nn.Embedding(24, 16), torch.randint(0, 24, (3, 4))),
}
CASES = [
    (format, name)
    for format in FORMATS.names()
    for name, (layer, _) in LAYERS.items()
    if format != "tt_embedding" and not FORMATS.get(format).unsupported_reason(spec_of(layer)[0])
]


@pytest.mark.parametrize(("format", "name"), CASES)
def test_every_format_scripts(format: str, name: str) -> None:
    dense, x = LAYERS[name]
    spec, _ = spec_of(dense)
    family = list(FORMATS.get(format).rank_family(spec))
    torch.manual_seed(0)
    for rank in {str(r): r for r in (family[0], family[len(family) // 2])}.values():
        layer = FactorizedLayer.empty(spec, format, rank, like=torch.zeros(1))
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
        scripted = torch.jit.script(layer)
        torch.testing.assert_close(scripted(x), layer(x))
        assert torch.equal(torch.jit.trace(layer, x)(x), layer(x))


def test_a_compressed_network_scripts() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3)).eval()
    x = torch.randn(2, 3, 8, 8)
    recipe = {"budget": "macs=0.6", "fuse_batchnorm": True}
    small = tenfold.compress(net, x, recipe, runtime=Runtime(measure=False)).model.eval()
    torch.testing.assert_close(torch.jit.script(small)(x), small(x))


def test_an_output_size_is_refused_in_a_script_and_not_ignored() -> None:
    spec, _ = spec_of(nn.ConvTranspose2d(6, 4, 3, stride=2))
    layer = FactorizedLayer.empty(spec, "low_rank", {"rank": 2}, like=torch.zeros(1))
    with pytest.raises(torch.jit.Error):
        torch.jit.script(layer)(torch.ones(1, 6, 4, 4), [10, 10])
