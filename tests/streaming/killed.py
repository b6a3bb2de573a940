"""A streamed run that ends itself by SIGKILL, in the middle of a step: for processes that tests start."""

from __future__ import annotations

import importlib
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tenfold import Runtime
from tenfold.streaming import compress_streamed
from tests.streaming.test_stream import Net

# What runs once for each batch of a step: in passes forward, in passes back, and while blocks are fitted.
STEPS = {
    "forward": ("tenfold.streaming.statistics", "run_block"),
    "back": ("tenfold.calibration.gradients.GradientSums", "add_sent_back"),
    "fit": ("tenfold.streaming.block_fits", "run_block"),
}


def run(folder: Path, step: str | None = None, calls: int = 0) -> None:
    """Compress what lies in ``folder/dense``; at the given call of a step the process is no more."""
    torch.set_num_threads(1)
    if step is not None:
        owner, name = _found(STEPS[step][0]), STEPS[step][1]
        own, left = getattr(owner, name), [calls]

        def counting(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return own(*args, **kwargs)

        setattr(owner, name, counting)
    data = list(torch.load(folder / "data.pt", weights_only=True))
    compress = partial(compress_streamed, folder / "dense", folder / "out", "params=0.6", data=data)
    compress(skeleton=Net().to("meta"), runtime=Runtime(folder=folder / "work"))


def _found(path: str) -> Any:
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)
