"""Target runtimes: what a compressed model is planned for. One subclass of ``TargetRuntime`` in one file makes one."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from math import ceil, prod
from typing import Any, ClassVar

import torch
from torch import nn

from tenfold.errors import ProfileError, require
from tenfold.profiling import Comparison, LatencyTable
from tenfold.profiling.latency.measure import compare_blocks
from tenfold.records import LayerSpec, Shape, SubLayerSpec
from tenfold.registry import Registry
from tenfold.tracing.contexts import device_of

Compare = Callable[..., Comparison]
Block = Callable[[int], float]  # runs so many times, returns the seconds of one run
Timer = Callable[[SubLayerSpec, Shape], float]

_BLOCK_SECONDS = 0.003
_MOST_BLOCKS, _MOST_WEIGHTS = 256, 2**20  # that are kept for a second sample


@dataclass(frozen=True)
class Conditions:
    """How a model is to run: device, dtype of weights and activations, CPU threads, memory format."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    threads: int = field(default_factory=torch.get_num_threads)
    memory_format: str = "contiguous"


@dataclass(frozen=True)
class LayerPair:
    """A dense layer, and the sub-layers of the factorized one that would replace it, on one input shape."""

    dense: LayerSpec
    format: str
    rank: Mapping[str, int]
    in_shape: Shape
    stages: tuple[SubLayerSpec, ...]


class TargetRuntime(abc.ABC):
    """What runs a model in the end: it builds, runs and times models, layers and chains of layers.

    Attributes:
        name: in the registry.
        packages: required besides torch; their versions are part of the key of its times.
        extra: the extra of tenfold that installs the packages.
        devices: types of devices that it runs on; none for all of torch's.
        dtypes: of the weights that it runs; none for all of torch's.
        plain_layers: whether only layers of torch itself can be timed in it: a format with other sub-layers is then
            no candidate.
        observable: whether single layers can be watched in a forward of the whole model.
    """

    name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32,)
    plain_layers: ClassVar[bool] = True
    observable: ClassVar[bool] = False

    def check_installed(self) -> None:
        """Raise MissingExtraError if a required package is not installed."""
        for package in self.packages:
            require(package, self.extra)

    def check(self, model: nn.Module, inputs: Any) -> None:
        """Raise before anything is measured what this runtime lacks.

        Raises:
            MissingExtraError: a package.
            ProfileError: the device or the precision of the model.
        """
        self.check_installed()
        device = device_of(model, inputs).type
        if self.devices and device not in self.devices:
            msg = f"{self.name} runs on {' or '.join(self.devices)}, and the model is on {device}: move it there first"
            raise ProfileError(msg)
        held = {p.dtype for p in model.parameters() if p.is_floating_point()}
        if self.dtypes and not held <= set(self.dtypes):
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in held))
            msg = f"{self.name} is timed with weights in {names}, and the model has {found}: convert it first"
            raise ProfileError(msg)

    def versions(self) -> dict[str, str]:
        """Return the versions of what runs a model here, besides torch."""
        found = {}
        for package in self.packages:
            try:
                found[package] = version(package)
            except PackageNotFoundError:  # part of another distribution
                continue
        return found

    def memory_formats(self, inputs: Any) -> tuple[str, ...]:
        """Return the memory formats that a model on these inputs may run in; one where the runtime has its own."""
        del inputs
        return ("contiguous",)

    @abc.abstractmethod
    def ready(self, model: nn.Module, inputs: Any, memory_format: str, threads: int) -> tuple[nn.Module, Any]:
        """Return the model as it runs here, and the inputs to call it with; the model stays as it is.

        Raises:
            ExportError: the runtime cannot build the model.
        """

    @abc.abstractmethod
    def chain(self, layers: Sequence[SubLayerSpec], in_shape: Shape, conditions: Conditions) -> Block:
        """Return what times layers one after the other, with made-up weights, between two others.

        What they share with their neighbours is theirs no more than in a whole network: a memory format that is kept
        from layer to layer costs nothing, one that has to change does.

        Raises:
            ExportError: the runtime cannot build them.
        """

    def clock(self, model: nn.Module, inputs: Any, **options: Any) -> LatencyTable:
        """Return the latency table of this runtime, for the device and dtype of a model.

        Args:
            model: that is to be planned for.
            inputs: what it is to run on.
            options: of ``LatencyTable``.
        """
        weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        device, threads = device_of(model, inputs), options.pop("threads", None) or torch.get_num_threads()
        at = Conditions(device, weight.dtype, threads, self.memory_formats(inputs)[0])
        return LatencyTable(
            runtime=self.name,
            versions=self.versions(),
            device=at.device,
            dtype=at.dtype,
            threads=at.threads,
            memory_format=at.memory_format,
            timer=self.layer_timer(at),
            **options,
        )

    def layer_timer(self, at: Conditions) -> Timer | None:
        """Return what times one layer; None for that of eager torch."""
        blocks: dict[tuple[SubLayerSpec, Shape], tuple[Block, int]] = {}  # building takes longer than timing

        def milliseconds(spec: SubLayerSpec, in_shape: Shape) -> float:
            known = blocks.get((spec, in_shape))
            block, number = known or (self.chain((spec,), in_shape, at), 0)
            number = number or max(3, ceil(_BLOCK_SECONDS / max(block(1), 1e-7)))
            if len(blocks) < _MOST_BLOCKS and prod(spec.weight_shape) < _MOST_WEIGHTS:
                blocks[spec, in_shape] = block, number
            return 1e3 * block(number)

        return milliseconds

    def compare_layer(self, pair: LayerPair, at: Conditions, *, seconds: float, compare: Compare) -> Comparison:
        """Return ``dense`` and ``factorized``, timed in turns.

        Args:
            pair: a layer, and what would replace it.
            at: how to run them.
            seconds: about how long to measure.
            compare: times models in turns, for runtimes that compare layers as models.

        Raises:
            ExportError: the runtime cannot build one of them.
        """
        del compare
        blocks = {
            "dense": self.chain((pair.dense,), pair.in_shape, at),
            "factorized": self.chain(pair.stages, pair.in_shape, at),
        }
        return compare_blocks(blocks, seconds=seconds, threads=at.threads)


RUNTIMES: Registry[TargetRuntime] = Registry("runtime")


def runtime_named(name: str) -> TargetRuntime:
    """Return the runtime of a name.

    Raises:
        UnknownNameError: there is none.

    Example:
        >>> runtime_named("torch").name
        'torch'
    """
    return RUNTIMES.get(name)()
