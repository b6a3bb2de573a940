"""Torch compiled: ``torch.compile`` with frozen weights."""

from __future__ import annotations

import shutil
from typing import Any

import torch
from torch import nn

from tenfold.errors import ProfileError
from tenfold.profiling import to_memory_format
from tenfold.runtimes.base import RUNTIMES
from tenfold.runtimes.eager import Eager
from tenfold.runtimes.quiet import quiet
from tenfold.tracing.contexts import device_of


@RUNTIMES.register("torch-compile")
class Compiled(Eager):
    """``torch.compile`` of the whole model, its weights frozen; layers one by one are timed in eager torch.

    On CPUs a compiled model calls the same kernels for convolutions and products as an eager one: what is compiled is
    what stands between them. Whole models are therefore timed compiled, and plans corrected by that.
    """

    name = "torch-compile"
    observable = False

    def check(self, model: nn.Module, inputs: Any) -> None:
        """Raise ProfileError where there is no compiler for C++."""
        super().check(model, inputs)
        if device_of(model, inputs).type == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++"))):
            msg = "torch-compile needs a compiler for C++ on the CPU, and there is none: install g++, or use another"
            raise ProfileError(msg)

    def ready(self, model: nn.Module, inputs: Any, memory_format: str, threads: int) -> tuple[nn.Module, Any]:
        """Return the model compiled for inputs of this size."""
        made, own = to_memory_format(model, inputs, memory_format)
        del threads
        with quiet():
            return _Compiled(made.eval()), own


class _Compiled(nn.Module):
    """A compiled model, hidden from ``eval()``, which would compile it again."""

    runtime = "torch-compile"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._run = [torch.compile(model, dynamic=False, options={"freezing": True})]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs."""
        with torch.no_grad():
            return self._run[0](*args, **kwargs)
