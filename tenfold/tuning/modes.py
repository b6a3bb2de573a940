"""What training disturbs and has to put back: train modes and random generators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter; the CPU for a model without any."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Give every module its own train or eval mode back at the end."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def forked_rng(device: torch.device) -> Iterator[None]:
    """Give torch's global generators, on the CPU and on ``device``, their states back at the end."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def seed_epoch(device: torch.device, seed: int, epoch: int, process: int = 0) -> None:
    """Make all randomness of an epoch a function of the seed and its number, so that no state need be stored."""
    value = (seed * 1_000_003 + epoch + process * 7_368_787_001) % 2**63
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(value)
