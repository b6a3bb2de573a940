"""export(): every target, what it refuses, and that what it refuses leaves nothing behind."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tenfold import Runtime, compress, export
from tenfold.errors import ExportError, MissingExtraError, TenfoldWarning, UnknownNameError
from tenfold.exporting import EXPORTERS, ExportConfig, int8_linear, open_exported, quantize_onnx
from tenfold.exporting.parity import check_parity
from tenfold.layers.recurrent import open_recurrent
from tenfold.layers.tt_linear import COMPILED_ROWS, TTLinear
from tenfold.runtimes.program import program_of

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the exporters, about themselves

UNTIMED = ExportConfig(seconds=0)

onnx_only = pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="needs the extra export")


def _net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)
        )
        net(torch.randn(16, 3, 4, 4))  # statistics of the batch norm
    return net.eval()


def _left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Two(nn.Module):
    """Two inputs, one by name; several outputs."""

    def forward(self, a: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
        return {"product": a * scale, "sum": a + scale.sum(1, keepdim=True)}


class AnyKeywords(nn.Module):
    """Inputs that only ``*args`` and ``**kwargs`` take, in another order than they are named."""

    def forward(self, *terms: Tensor, shift: Tensor, **more: Tensor) -> Tensor:
        return (terms[0] - terms[1]) * more["scale"] + shift / more["by"]


class ByValue(nn.Module):
    """A forward that looks at values, which no file can."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sin() if float(x.sum()) > 0 else x.cos()


class Letters(nn.Module):
    """A forward that reads texts."""

    def forward(self, texts: list[str]) -> Tensor:
        return torch.tensor([[float(text.count(letter)) for letter in "abcd"] for text in texts])


class Off(nn.Module):
    """A network that is off by more than half precision explains."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * 1.01


class ByCount(nn.Module):
    """A forward that counts what it has found, as detectors do."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ones(int((x > 0).sum()))


class ByMode(nn.Module):
    """A forward that computes something else while it is traced."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 1.001 if torch.compiler.is_compiling() else x


@onnx_only
@pytest.mark.parametrize("fold", [True, False])
def test_the_file_takes_any_batch_and_the_model_stays_as_it_is(fold: bool, tmp_path: Path) -> None:
    net, path = _net().train(), tmp_path / "net.onnx"
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    made = export(net, torch.randn(1, 3, 4, 4), path, config=ExportConfig(fuse_batchnorm=fold, seconds=0.02))
    assert net.training
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert (made.fused, made.dynamic_batch, made.bytes) == (int(fold), True, path.stat().st_size)
    assert set(made.parity) == {1, 2, 5}
    assert made.latency is not None
    assert "onnxruntime" in made.environment.versions
    x = torch.randn(9, 3, 4, 4)
    torch.testing.assert_close(open_exported(path)(x), net.eval()(x), rtol=1e-4, atol=1e-5)
    assert _left(tmp_path) == ["net.onnx"]


@pytest.mark.parametrize("to", ["onnx", "torch-export"])
def test_named_inputs_and_several_outputs(to: str, tmp_path: Path) -> None:
    if to == "onnx":
        pytest.importorskip("onnxscript")
    inputs = (torch.randn(3, 4), {"scale": torch.randn(3, 4)})
    made = export(Two(), inputs, tmp_path / "two", to=to, config=UNTIMED)
    assert max(made.parity.values()) < 1e-6
    assert set(made.parity) == {1, 2, 3, 5}


@pytest.mark.parametrize("to", [pytest.param("onnx", marks=onnx_only), "torch-export"])
def test_inputs_by_keywords_that_the_forward_does_not_name(to: str, tmp_path: Path) -> None:
    model = AnyKeywords()
    named = {"scale": torch.randn(2, 1), "shift": torch.randn(2, 4), "by": torch.rand(2, 4) + 1}
    inputs = (torch.randn(2, 4), torch.randn(2, 4), named)
    made = export(model, inputs, tmp_path / "keywords", to=to, config=UNTIMED)
    assert list(made.parity) == [1, 2, 5]
    assert max(made.parity.values()) < 1e-5
    assert "forward" not in vars(model)


def test_a_fixed_batch_is_checked_as_it_is(tmp_path: Path) -> None:
    made = export(
        _net(),
        torch.randn(4, 3, 4, 4),
        tmp_path / "a.pt2",
        to="torch-export",
        config=UNTIMED.replace(dynamic_batch=False),
    )
    assert (list(made.parity), made.dynamic_batch) == ([4], False)


@pytest.mark.parametrize(("samples", "largest"), [(1, 64), (70, 70)])
def test_executorch_runs_the_file_up_to_its_largest_batch(samples: int, largest: int, tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    made = export(_net(), torch.randn(samples, 3, 4, 4), tmp_path / "a.pte", to="executorch", config=UNTIMED)
    assert list(made.parity) == [1, 2, 5, largest]
    assert max(made.parity.values()) < 1e-5


def test_executorch_multiplies_cores_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("executorch")
    torch.manual_seed(0)
    exporter, layer = EXPORTERS.get("executorch")(), TTLinear(256, 256, 4, cores=4).eval()
    order, _ = layer.order(COMPILED_ROWS)
    assert len(order) < 4  # some cores are multiplied with each other first
    written: list[Any] = []
    exir, name = importlib.import_module("executorch.exir"), "to_edge_transform_and_lower"
    lower = getattr(exir, name)
    monkeypatch.setattr(exir, name, lambda program, **kw: written.append(program) or lower(program, **kw))
    program = program_of(layer, torch.randn(1, 256), dynamic_batch=True, max_batch=64)
    exporter.write(program, tmp_path / "a.pte", opset=None)
    products = [node for node in written[0].graph.nodes if "mm" in str(node.target) or "matmul" in str(node.target)]
    assert len(products) == len(order)
    assert (tmp_path / "a.pte").stat().st_size < 4 * 256 * 256
    x = torch.randn(64, 256)
    torch.testing.assert_close(exporter.open(tmp_path / "a.pte")(x), layer(x), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_is_said_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ExportError, match="cannot be exported on inputs"):
        export(ByCount(), torch.ones(2, 3), tmp_path / "a.pt2", to="torch-export", config=UNTIMED)
    assert capfd.readouterr().err == ""
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


class Packed(nn.Module):
    """Sequences of several lengths, packed for a recurrent network."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0])[0]


class OnPacked(nn.Module):
    """A network that is given sequences packed before."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.LSTM(3, 4)

    def forward(self, packed: nn.utils.rnn.PackedSequence) -> Tensor:
        return self.net(packed)[0].data


@pytest.mark.parametrize("rnn", [nn.LSTM(3, 4), nn.GRU(3, 4, bidirectional=True), open_recurrent(nn.GRU(3, 4))])
def test_packed_sequences_are_named(rnn: nn.Module, tmp_path: Path) -> None:
    words = r"layer 'rnn\S*' runs on packed sequences\. .*give the recurrent network padded ones"
    with pytest.raises(ExportError, match=words) as caught:
        export(Packed(rnn), (torch.ones(5, 2, 3), torch.tensor([5, 3])), tmp_path / "a.pt2", to="torch-export")
    assert "zeros()" not in str(caught.value)


@pytest.mark.parametrize("dynamic_batch", [False, True])
def test_inputs_that_are_packed_are_named(tmp_path: Path, *, dynamic_batch: bool) -> None:
    inputs = nn.utils.rnn.pack_padded_sequence(torch.ones(5, 2, 3), torch.tensor([5, 3]))
    config = ExportConfig(seconds=0, dynamic_batch=dynamic_batch)
    with pytest.raises(ExportError, match="layer 'net' runs on packed sequences"):
        export(OnPacked(), inputs, tmp_path / "a.pt2", to="torch-export", config=config)


def test_an_export_introduces_itself(tmp_path: Path) -> None:
    made = export(nn.Linear(4, 3), torch.ones(2, 4), tmp_path / "a.pt2", to="torch-export", config=UNTIMED)
    assert re.fullmatch(r"<ExportRecord of a\.pt2: torch-export, \S+ KiB, largest error \d\.\de[-+]\d\d>", repr(made))
    assert made.summary().startswith(f"a.pt2: torch-export, {made.bytes:,} bytes, batches of any size\nlargest error")
    assert made._repr_html_().startswith('<div class="tenfold"')
    assert type(made).from_text(made.to_json()) == made


def test_what_cannot_be_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    x, path = torch.ones(2, 3), tmp_path / "a.pt2"
    where = r"ByValue cannot be exported .* goes by a value at test_export\.py:\d+ \(return x\.sin.*computed outside"
    with pytest.raises(ExportError, match=where):
        export(ByValue(), x, path, to="torch-export", config=UNTIMED)
    with pytest.raises(ExportError, match=r"tolerance 0\.0001: nothing was kept"):
        export(ByMode(), x, path, to="torch-export", config=UNTIMED)
    assert _left(tmp_path) == []
    assert export(ByMode(), x, path, to="torch-export", config=UNTIMED.replace(tolerance=1e-2)).parity[
        2
    ] == pytest.approx(1e-3, 1e-2)
    with pytest.raises(ExportError, match="exists"):
        export(nn.ReLU(), x, path, to="torch-export", config=UNTIMED)
    with pytest.raises(UnknownNameError, match="torch-export"):
        export(nn.ReLU(), x, path, to="torch_export", config=UNTIMED)
    with pytest.raises(ExportError, match="NaN or infinite"):
        export(nn.ReLU(), x / 0, tmp_path / "b.pt2", to="torch-export", config=UNTIMED)
    with pytest.raises(ExportError, match="no file"):
        open_exported(tmp_path / "c.onnx")


@onnx_only
def test_a_dtype_that_the_runtime_lacks_is_said(tmp_path: Path) -> None:
    net, x = _net().to(torch.bfloat16), torch.randn(2, 3, 4, 4).to(torch.bfloat16)
    with pytest.raises(ExportError, match=r"in float32: model\.float\(\)"):
        export(net, x, tmp_path / "a.onnx", config=UNTIMED)
    assert _left(tmp_path) == []


@dataclass
class Unknown:
    """What a forward returns in a class that torch.export was not told about."""

    logits: Tensor
    hidden: Tensor | None = None


@dataclass
class Registered(Unknown):
    """The same, told."""


class Returning(nn.Module):
    """A forward that returns its outputs in a class."""

    def __init__(self, kind: type[Unknown]) -> None:
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Unknown:
        return self.kind(self.linear(x))


def test_outputs_in_a_class_are_exported_once_it_is_registered(tmp_path: Path) -> None:
    x, path = torch.ones(2, 4), tmp_path / "a.pt2"
    with pytest.raises(
        ExportError, match=r"torch\.export\.register_dataclass\(Output, serialized_type_name='Output'\)"
    ):
        export(Returning(Unknown), x, path, to="torch-export", config=UNTIMED)
    assert _left(tmp_path) == []
    torch.export.register_dataclass(Registered, serialized_type_name="Registered")
    assert max(export(Returning(Registered), x, path, to="torch-export", config=UNTIMED).parity.values()) < 1e-5


def test_half_precision_is_compared_by_its_rounding(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).half().eval()
    made = export(net, torch.randn(1, 64).half(), tmp_path / "half.onnx", config=UNTIMED)
    assert made.tolerance < max(made.parity.values()) < 4e-3
    with pytest.raises(ExportError, match=r"tolerance 0\.0039"):
        check_parity(net, Off(net), torch.randn(1, 64).half(), dynamic_batch=True, tolerance=1e-4)


def test_a_forward_of_texts_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"takes no tensor in .*as constants"):
        export(Letters(), ["some text"], tmp_path / "texts.pt2", to="torch-export", config=UNTIMED)
    assert _left(tmp_path) == []


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"tenfold\[export\]"):
        export(nn.ReLU(), torch.ones(1, 2), tmp_path / "a.onnx")
    assert EXPORTERS.names() == ("executorch", "onnx", "openvino", "torch-export")


@onnx_only
def test_int8_of_a_file(tmp_path: Path) -> None:
    source, path = tmp_path / "a.onnx", tmp_path / "b.onnx"
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 9))
    export(net.eval(), torch.randn(1, 3, 5, 5), source, config=UNTIMED)
    batches = [torch.randn(8, 3, 5, 5) for _ in range(4)]
    labelled = [(batch, torch.zeros(8).long()) for batch in batches]  # as a loader puts them out
    with pytest.warns(TenfoldWarning, match="left out, as labels"):
        made = quantize_onnx(source, path, labelled, operators="Conv", seconds=0)
    assert made.operators["Conv"] == 2
    assert "Gemm" not in made.operators  # was not asked for
    assert made.samples == 32
    assert 0 < made.noise < 0.05
    assert path.stat().st_size < 0.5 * made.was_bytes == 0.5 * source.stat().st_size
    found, wanted = open_exported(path)(batches[0]), net(batches[0])
    assert float((found - wanted).norm() / wanted.norm()) < 0.05
    with pytest.raises(ExportError, match="exists"):
        quantize_onnx(source, path, batches)
    assert _left(tmp_path) == ["a.onnx", "b.onnx"]


def test_int8_of_linear_layers() -> None:
    pytest.importorskip("torchao")
    net, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)).eval(), torch.randn(16, 64)
    wanted = net(x)
    for activations, bound in ((True, 0.03), (False, 0.015)):
        found = int8_linear(net, activations=activations)(x)
        assert 1e-5 < float((found - wanted).norm() / wanted.norm()) < bound
    assert torch.equal(net(x), wanted)
    with pytest.raises(ExportError, match="no linear layer"):
        int8_linear(nn.Sequential(nn.Conv2d(3, 3, 1)))


class Tagger(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.rnn = kind(16, 32, batch_first=True, **options)  # type: ignore[call-arg]
        self.out = nn.Linear(64 if self.rnn.bidirectional else 32, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        out, state = self.rnn(x)
        return self.out(out), state


@pytest.mark.parametrize("to", ["torch-export", pytest.param("onnx", marks=onnx_only)])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"num_layers": 2, "bias": False}])
def test_unrolled_networks_take_any_batch(
    to: str, kind: type[nn.RNNBase], options: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net, x = Tagger(kind, **options).eval(), torch.randn(3, 5, 16)
    small = compress(net, x, "params=0.6", runtime=Runtime(measure=False))
    assert small.plan.unrolled == {"rnn": kind.__name__}
    record = export(small.model, x, tmp_path / "small", to=to, config=UNTIMED)
    assert record.dynamic_batch
    assert sorted(record.parity) == [1, 2, 3, 5]
