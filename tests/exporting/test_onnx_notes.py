"""ONNX files hold the network and nothing else: other tools take them, and nobody's paths are in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tenfold import Runtime, compress, export
from tenfold.exporting import ExportConfig, open_exported, quantize_onnx

onnx = pytest.importorskip("onnx")
quantization = pytest.importorskip("onnxruntime.quantization")
pytest.importorskip("onnxscript")

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the exporters, about themselves


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(8, 3, 8, 8) for _ in range(4)]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, batches: list[Tensor]) -> Path:
    """Return the file of a compressed network with convolutions and linear layers."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten())
    net.extend([nn.Linear(256, 48), nn.ReLU(), nn.Linear(48, 9)])
    small = compress(net.eval(), batches[0][:1], "macs=0.6", runtime=Runtime(measure=False))
    path = tmp_path_factory.mktemp("files") / "small.onnx"
    export(small.model, batches[0][:1], path, config=ExportConfig(seconds=0))
    return path


def _change(file: Path, other: Path, batches: list[Tensor]) -> float:
    wanted, found = (torch.cat([open_exported(path)(x) for x in batches]) for path in (file, other))
    return float((found - wanted).norm() / wanted.norm())


def _notes(message: Any) -> set[str]:
    """Return the names of the fields for notes that are filled, anywhere below a message."""
    found = {f.name for f, _ in message.ListFields()} & {"doc_string", "metadata_props", "value_info"}
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            found |= {n for part in ([value] if hasattr(value, "DESCRIPTOR") else value) for n in _notes(part)}
    return found


def test_files_have_no_notes(file: Path, batches: list[Tensor], tmp_path: Path) -> None:
    quantize_onnx(file, tmp_path / "int8.onnx", batches, seconds=0)
    for path in (file, tmp_path / "int8.onnx"):
        assert _notes(onnx.load(path).graph) == set()
        assert not any(word in path.read_bytes() for word in (b"stack_trace", b"torch/nn", b"fx_node"))
        onnx.checker.check_model(path, full_check=True)


def test_dynamic_quantization_takes_the_file(file: Path, batches: list[Tensor], tmp_path: Path) -> None:
    quantization.quantize_dynamic(file, tmp_path / "dynamic.onnx")
    assert any(node.op_type == "MatMulInteger" for node in onnx.load(tmp_path / "dynamic.onnx").graph.node)
    assert 0 < _change(file, tmp_path / "dynamic.onnx", batches) < 0.05


def test_static_quantization_takes_the_file(file: Path, batches: list[Tensor], tmp_path: Path) -> None:
    rest = iter([{"input": batch.numpy()} for batch in batches])

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> Any:
            return next(rest, None)

    quantization.quantize_static(file, tmp_path / "static.onnx", Reader())
    assert 0 < _change(file, tmp_path / "static.onnx", batches) < 0.05


def test_notes_of_branches_and_functions_go_too(tmp_path: Path) -> None:
    from tenfold.runtimes.onnx_notes import write_bare

    make = onnx.helper
    value = make.make_tensor_value_info("y", 1, [2], doc_string="traced")
    branch = make.make_graph([make.make_node("Abs", ["x"], ["y"], doc_string="line 7")], "branch", [], [value])
    both = make.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    step = make.make_function("own", "Step", ["x"], ["y"], [make.make_node("Abs", ["x"], ["y"], doc_string="a")], [])
    model = make.make_model(make.make_graph([both], "g", [], [value], doc_string="whole"), functions=[step])
    make.set_model_props(model, {"labels": "cat, dog"})
    write_bare(model, tmp_path / "a.onnx")
    found = onnx.load(tmp_path / "a.onnx")
    assert _notes(found.graph) | _notes(found.functions[0]) == set()
    assert found.metadata_props[0].value == "cat, dog"  # a user's, of the model itself
