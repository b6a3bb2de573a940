"""Weights are rounded for the outputs of their layer, in files that were quantized before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tenfold import export
from tenfold.exporting import ExportConfig, open_exported, quantize_onnx
from tenfold.exporting.onnx_rounding import _patches, rounded

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the exporters, about themselves


def test_rounding_is_better_for_outputs_than_the_nearest_integers() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(3, 12, 4).double() @ torch.randn(3, 4, 500).double()  # 12 inputs that vary in 4 directions
    inputs += 0.05 * torch.randn_like(inputs)
    weight, scale = 3 * torch.randn(3, 5, 12).double(), torch.full((3, 5, 1), 0.5).double()
    made = rounded(weight, scale, inputs @ inputs.mT / 500)
    assert torch.equal(made, made.round())

    def error(integers: Tensor) -> Tensor:
        return ((integers * scale - weight) @ inputs).square().mean((1, 2))

    assert bool((error(made) < 0.3 * error((weight / scale).round())).all())


def test_inputs_that_are_always_zero_change_nothing() -> None:
    weight, scale = torch.tensor([[[0.6, -0.2], [1.4, 3.0]]]).double(), torch.ones(1, 2, 1).double()
    assert rounded(weight, scale, torch.zeros(1, 2, 2).double()).tolist() == [[[1.0, 0.0], [1.0, 3.0]]]


@pytest.mark.parametrize(
    "options",
    [{"padding": 1}, {"stride": 2}, {"padding": 2, "dilation": 2}, {"groups": 3}, {"stride": (1, 2)}],
)
def test_patches_are_what_the_convolution_multiplies(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(6, 9, 3, bias=False, **options), torch.randn(2, 6, 8, 8)
    pads = [*layer.padding, *layer.padding]
    attributes = {"pads": pads, "strides": layer.stride, "dilations": layer.dilation, "group": layer.groups}
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"], **attributes)
    patches = _patches(x, node, (3, 3), 10**6).reshape(layer.groups, -1, 2 * layer(x)[0, 0].numel())
    found = (layer.weight.flatten(1).reshape(layer.groups, 9 // layer.groups, -1) @ patches).flatten(0, 1)
    torch.testing.assert_close(found, layer(x).transpose(0, 1).flatten(1))
    assert _patches(x, node, (3, 3), 20).shape[1] <= 2 * 20


def test_int8_is_closer_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 32, 1), nn.ReLU(), nn.Conv2d(32, 6, 3))
    with torch.no_grad():  # for a channel that is small in front of it, integers are coarse in the middle layer
        for weight in (net[0].weight, net[0].bias):
            weight[0] /= 30  # type: ignore[index, operator]
        net[2].weight[:, 0] *= 30  # type: ignore[index, operator]

    def smooth(samples: int) -> Tensor:
        return F.interpolate(torch.randn(samples, 3, 3, 3), size=8, mode="bilinear")

    batches, x = [smooth(8) for _ in range(4)], smooth(64)
    export(net.eval(), batches[0][:1], tmp_path / "net.onnx", config=ExportConfig(seconds=0))
    made = quantize_onnx(tmp_path / "net.onnx", tmp_path / "int8.onnx", batches, seconds=0)
    assert (made.rescaled, made.rounded) == (0, 3)
    monkeypatch.setattr("tenfold.exporting.int8_onnx.round_weights_", lambda *_: 0)
    plain = quantize_onnx(tmp_path / "net.onnx", tmp_path / "plain.onnx", batches, seconds=0)
    assert made.noise < 0.9 * plain.noise
    wanted = open_exported(tmp_path / "net.onnx")(x)
    errors = [(open_exported(tmp_path / f"{name}.onnx")(x) - wanted).norm() for name in ("int8", "plain")]
    assert errors[0] < errors[1]
