from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture
def detectors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Detectors of torchvision run, with its own operators or with one of ours in the place of a missing one."""
    pytest.importorskip("torchvision")
    from torchvision import extension
    from torchvision.ops import boxes

    if extension._has_ops():
        yield
        return
    spec = importlib.util.spec_from_file_location("detection", Path(__file__).parent / "detection.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(boxes, "_assert_has_ops", lambda: None)
    library = torch.library.Library("torchvision", "IMPL")
    library.impl("nms", module.nms, "CPU")
    yield
    library._destroy()
