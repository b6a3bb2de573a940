"""Channels between convolutions share a range before they are quantized; the network stays what it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tenfold import export
from tenfold.exporting import ExportConfig, open_exported, quantize_onnx
from tenfold.exporting.onnx_rescale import best_shares, rescale_

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the exporters, about themselves


class Chains(nn.Module):
    """A CP chain whose channels differ by orders of magnitude, one with groups, and layers that must stay."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        first, middle = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.chain = nn.Sequential(first, middle, nn.Conv2d(8, 6, 1))
        self.grouped = nn.Sequential(nn.Conv2d(6, 8, 1, bias=False), nn.Conv2d(8, 4, 3, stride=2, groups=2))
        self.seen, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
        with torch.no_grad():
            scale = torch.logspace(-2, 2, 8)
            first.weight.mul_(scale[:, None, None, None])
            middle.weight.div_(scale[:, None, None, None])
            first.bias.mul_(scale)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.grouped(torch.relu(self.chain(x)))
        z = self.seen(y) + y  # y has two readers
        return self.last(z), z


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(16, 4, 9, 9) for _ in range(4)]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, batches: list[Tensor]) -> Path:
    path = tmp_path_factory.mktemp("files") / "chains.onnx"
    export(Chains().eval(), batches[0][:1], path, config=ExportConfig(seconds=0))
    return path


def _largest(path: Path, name: str, x: Tensor) -> Tensor:
    model = onnx.load(path)
    model.graph.output.append(onnx.ValueInfoProto(name=name))
    onnx.save(model, path.with_suffix(".shown.onnx"))
    values: Tensor = open_exported(path.with_suffix(".shown.onnx"))(x)[-1]
    return values.abs().amax((0, 2, 3))


def test_ranges_become_one_and_outputs_stay(file: Path, batches: list[Tensor], tmp_path: Path) -> None:
    model, path = onnx.load(file), tmp_path / "rescaled.onnx"
    ranges = rescale_(model, batches)
    onnx.save(model, path)
    assert len(ranges) == 3  # two in the chain, one before the groups: the others have readers or a bound between
    for before, after in zip(open_exported(file)(batches[0]), open_exported(path)(batches[0]), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    first, x = next(iter(ranges)), torch.cat(batches)
    was, found = _largest(file, first, x), _largest(path, first, x)
    bound = max(-ranges[first][0], ranges[first][1])
    assert float(was.max() / was.min()) > 1000
    assert 0.9 * bound < float(found.min()) <= float(found.max()) < 4 * bound  # a few values are clipped


def test_int8_of_uneven_channels_is_nearly_that_of_even_ones(
    file: Path, batches: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = quantize_onnx(file, tmp_path / "int8.onnx", batches, seconds=0)
    assert made.rescaled == 3
    monkeypatch.setattr("tenfold.exporting.int8_onnx.rescale_", lambda *_: {})
    plain = quantize_onnx(file, tmp_path / "plain.onnx", batches, seconds=0)
    assert made.noise < 0.02 < 0.3 * plain.noise


@pytest.mark.parametrize("most", [3.0, 12.0, 60.0])
def test_a_range_leaves_out_what_is_rare(most: float) -> None:
    torch.manual_seed(0)
    values = torch.distributions.Laplace(0.0, 1.0).sample((200_000,)).abs().clamp_max(most)
    values[0] = most

    def error(limit: float) -> float:
        step = 2 * limit / 255
        return float(((values / step).round() * step).clamp_max(limit).sub(values).square().mean())

    found = float(best_shares(torch.histc(values, 512, 0, most)[None])) * most
    assert error(found) <= 1.1 * min(error(float(limit)) for limit in torch.linspace(1, most, 60))


def test_what_stays_in_floating_point_is_left_alone(file: Path, batches: list[Tensor], tmp_path: Path) -> None:
    made = quantize_onnx(file, tmp_path / "int8.onnx", batches, operators=("Conv",), seconds=0)
    assert (made.rescaled, made.rounded) == (3, 7)
    node = next(node.name for node in onnx.load(file).graph.node if node.op_type == "Conv")
    kept = quantize_onnx(file, tmp_path / "kept.onnx", batches, keep=[node], seconds=0)
    assert kept.rounded == 6
