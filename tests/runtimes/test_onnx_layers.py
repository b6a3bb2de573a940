"""Small ONNX models of layers are the layers that they stand for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tenfold.errors import ExportError
from tenfold.records import ContractSpec, LayerSpec
from tenfold.runtimes.node_times import between_anchors, runs_of
from tenfold.runtimes.onnx_layers import INPUT, ChainModel

ort = pytest.importorskip("onnxruntime")


def conv(axes=2, **options):
    shape = {"in_channels": 8, "out_channels": 12, "kernel": (3, 3, 3)[:axes]}
    return LayerSpec(**({"kind": "conv", "bias": True} | shape | options))


LAYERS = [
    (conv(), (2, 8, 9, 9)),
    (conv(stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 8, 9, 9)),
    (conv(padding="same", dilation=(2, 1)), (1, 8, 7, 6)),
    (conv(padding="valid"), (1, 8, 7, 6)),
    (conv(padding=(1, 1), padding_mode="reflect"), (1, 8, 7, 6)),
    (conv(padding=(1, 2), padding_mode="circular"), (1, 8, 7, 6)),
    (conv(groups=4), (1, 8, 5, 5)),
    (conv(1, padding=(1,)), (3, 8, 10)),
    (conv(3), (1, 8, 4, 5, 6)),
    (conv(kind="conv_transpose", stride=(2, 2), output_padding=(1, 0)), (1, 8, 5, 4)),
    (LayerSpec(kind="linear", in_channels=8, out_channels=12, bias=True), (5, 8)),
    (LayerSpec(kind="linear", in_channels=8, out_channels=12, bias=True), (2, 3, 8)),
    (LayerSpec(kind="embedding", in_channels=20, out_channels=6), (4, 3)),
]


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=str)
def test_a_layer_between_anchors_runs_and_keeps_its_shape(layer, shape, int8):
    model = ChainModel((layer,), shape, int8=int8)
    session = ort.InferenceSession(model.to_bytes(), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {INPUT: model.example()})
    wanted = layer.out_shape(shape)
    place = len(wanted) - 1 - layer.axes
    assert np.delete(out.shape, place).tolist() == np.delete(wanted, place).tolist()
    if not layer.axes:
        assert out.shape[-1] == wanted[-1]


def test_what_is_no_plain_layer_is_refused():
    with pytest.raises(ExportError, match="only plain layers"):
        ChainModel((ContractSpec(modes=(4, 6), equation="...ab,cb->...ac", weight_shape=(5, 6)),), (7, 24))


def test_only_what_runs_between_the_anchors_counts():
    nodes = [
        ("ReorderInput", 5.0),
        ("anchor_before_nchwc", 1.0),
        ("layer0", 2.0),
        ("Reorder", 3.0),
        ("anchor_after", 9.0),
    ]
    assert between_anchors(nodes) == 5.0
    assert between_anchors([("layer0", 2.0), ("anchor_after", 1.0), ("Reorder", 4.0)]) == 2.0
    assert [between_anchors(run) for run in runs_of(nodes * 3, 3)] == [5.0] * 3


def test_a_chain_of_layers_is_timed_by_its_own_nodes():
    from tenfold.runtimes import Conditions, runtime_named

    torch.set_num_threads(1)
    spec = conv(in_channels=32, out_channels=32, padding=(1, 1), bias=False)
    runtime = runtime_named("onnxruntime")
    once = runtime.chain((spec,), (1, 32, 16, 16), Conditions(threads=1))(20)
    thrice = runtime.chain((spec, spec, spec), (1, 32, 16, 16), Conditions(threads=1))(20)
    assert 1.5 * once < thrice < 6 * once
