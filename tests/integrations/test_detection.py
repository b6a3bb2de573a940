"""Faster R-CNN: lists and dicts are profiled, and the backbone alone gives what is to be saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import tenfold
from tenfold.cli import main
from tenfold.profiling import profile
from tenfold.tasks import load_task

HEADS = "re:(?!backbone).*"  # all that is not in the backbone


@pytest.fixture(scope="module")
def detector() -> nn.Module:
    """Return a detector at its smallest: few proposals, since each goes through the heads."""
    pytest.importorskip("torchvision")
    model: Any = load_task("torchvision:fasterrcnn_mobilenet_v3_large_fpn@32").build()
    model.rpn._post_nms_top_n["testing"] = 8
    model.rpn._pre_nms_top_n["testing"] = 32
    return model


def backbone_macs(cost: Any) -> int:
    return sum(layer.macs for layer in cost.layers if layer.path.startswith("backbone"))


@pytest.mark.usefixtures("detectors")
def test_the_backbone_goes_to_half_its_macs_and_the_profile_is_the_flop_counters(detector: nn.Module) -> None:
    pictures = [torch.rand(3, 32, 32)]
    before = profile(detector, pictures)
    small = tenfold.compress(
        detector,
        pictures,
        {"budget": {"max_macs": before.macs - backbone_macs(before) // 2}, "rule": "ratio", "keep": HEADS},
        runtime=tenfold.Runtime(measure=False),
    )
    after = profile(small.model, pictures)
    for model, cost in ((detector, before), (small.model, after)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            found = model(pictures)
        assert cost.macs == counter.get_total_flops() // 2
        assert set(found[0]) == {"boxes", "labels", "scores"}
        assert not [layer.note for layer in cost.layers if "flop counter saw" in layer.note]
    assert 0.4 * backbone_macs(before) < backbone_macs(after) <= 0.5 * backbone_macs(before)
    assert all(layer.path.startswith("backbone") for layer in small.plan.factorized)
    kept = [layer for layer in small.plan.layers if not layer.path.startswith("backbone")]
    assert all(layer.reason == f"kept as asked by {HEADS!r}" for layer in kept)


def test_its_batch_norms_are_frozen_as_with_trained_weights(detector: nn.Module) -> None:
    kinds = {type(m).__name__ for m in detector.modules()}
    assert "FrozenBatchNorm2d" in kinds
    assert "BatchNorm2d" not in kinds


def test_example_inputs_are_a_list_of_pictures() -> None:
    pytest.importorskip("torchvision")
    task = load_task("torchvision:fasterrcnn_resnet50_fpn@64")
    assert [tuple(x.shape) for x in task.example_inputs(2)] == [(3, 64, 64)] * 2


ONE_COMMAND = (
    *("compress", "--keep", HEADS, "--rule", "ratio", "--set", "share=0.5", "--no-keep-ends"),
    *("--algorithms", "tucker2=hosvd", "--calibration-samples", "0", "--no-latency", "--json", "--out", "half"),
)
FEW_PROPOSALS = '''
"""The detector of the documentation with fresh weights, and few proposals: each goes through the heads."""
from tenfold.tasks.vision_zoo import TorchVision

class Detector(TorchVision):
    def make(self, *, trained):
        model = super().make(trained=False)
        model.rpn._pre_nms_top_n["testing"], model.rpn._post_nms_top_n["testing"] = 32, 8
        return model
'''


@pytest.mark.usefixtures("detectors")
def test_one_command_takes_the_backbone_of_a_resnet50_to_half_its_macs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.py").write_text(FEW_PROPOSALS)
    name = "few.py:Detector:fasterrcnn_resnet50_fpn@32"
    assert main([*ONE_COMMAND, "--task", name]) == 0
    before = json.loads(capsys.readouterr().out)["plan"]
    task = load_task(name)
    small, plan = tenfold.load(task.build(), "half")
    pictures = task.example_inputs(1)
    cost = profile(small.eval(), pictures)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        small(pictures)
    assert cost.macs == plan.after.macs == before["after"]["macs"] == counter.get_total_flops() // 2
    dense = sum(layer["before"]["macs"] for layer in before["layers"] if layer["path"].startswith("backbone"))
    assert 0.4 * dense < backbone_macs(cost) <= 0.5 * dense
    assert all(layer.path.startswith("backbone") for layer in plan.factorized)
