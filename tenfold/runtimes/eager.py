"""Torch itself, operator by operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from tenfold.layers import FactorizedLayer
from tenfold.profiling import Comparison, to_memory_format
from tenfold.profiling.latency.layer_timer import constant_input, layer_block, neutral_layer
from tenfold.profiling.latency.memory_format import memory_formats_for
from tenfold.records import Shape, SubLayerSpec
from tenfold.runtimes.base import RUNTIMES, Block, Compare, Conditions, LayerPair, TargetRuntime, Timer


@RUNTIMES.register("torch")
class Eager(TargetRuntime):
    """Torch operator by operator, as ``model(x)`` runs; in the better memory format."""

    name = "torch"
    devices: ClassVar[tuple[str, ...]] = ()
    dtypes: ClassVar[tuple[torch.dtype, ...]] = ()
    plain_layers = False
    observable = True

    def memory_formats(self, inputs: Any) -> tuple[str, ...]:
        """Return contiguous, and channels last where inputs have four or five axes."""
        return memory_formats_for(inputs)

    def ready(self, model: nn.Module, inputs: Any, memory_format: str, threads: int) -> tuple[nn.Module, Any]:
        """Return copies in a memory format."""
        del threads
        return to_memory_format(model, inputs, memory_format)

    def chain(self, layers: Sequence[SubLayerSpec], in_shape: Shape, conditions: Conditions) -> Block:
        """Return what times the layers one after the other."""
        at = conditions
        return layer_block(layers, in_shape, at.device, at.dtype, at.memory_format)

    def layer_timer(self, at: Conditions) -> Timer | None:
        """Return None: the latency table has the timer of eager torch, for every memory format."""
        del at
        return None

    def compare_layer(self, pair: LayerPair, at: Conditions, *, seconds: float, compare: Compare) -> Comparison:
        """Return ``dense`` and ``factorized``, timed in turns as modules."""
        like = torch.empty(0, device=at.device, dtype=at.dtype)
        x = constant_input(pair.dense, pair.in_shape, at.device, at.dtype)
        stages = [neutral_layer(spec, like) for spec in pair.stages]
        modules = {
            "dense": neutral_layer(pair.dense, like),
            "factorized": FactorizedLayer(pair.dense, pair.format, dict(pair.rank), stages),
        }
        variants = {name: to_memory_format(module, x, at.memory_format) for name, module in modules.items()}
        return compare(variants, seconds=seconds, threads=at.threads)
