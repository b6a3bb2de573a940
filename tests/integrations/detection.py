"""Non-maximum suppression for a torchvision whose compiled operators are missing, so that detectors run in tests."""

from __future__ import annotations

import torch
from torch import Tensor


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Return the indices of boxes that no better box overlaps by more than the threshold, the best first."""
    from torchvision.ops import box_iou

    order = scores.argsort(descending=True)
    overlap = box_iou(boxes[order], boxes[order]) > iou_threshold
    kept: list[int] = []
    for i in range(len(order)):
        if not overlap[i, kept].any():
            kept.append(i)
    return order[torch.tensor(kept, dtype=torch.long)]
