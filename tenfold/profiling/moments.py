"""Moments of what enters the layers of a model, from one pass over unlabeled batches."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.decompositions import Moments
from tenfold.errors import CalibrationWarning, DataError
from tenfold.layers import FactorizedLayer, describe
from tenfold.profiling.inputs import call_model, tensors_in
from tenfold.profiling.modes import evaluating, layer_by_layer
from tenfold.profiling.patches import input_patches, output_rows
from tenfold.records import LayerSpec

logger = logging.getLogger("tenfold")

Forward = Callable[[nn.Module, Any], object]

# Patches are gathered for as many samples at a time as fit into this many bytes.
_CHUNK_BYTES = 1 << 27


def moment_bytes(specs: Mapping[str, LayerSpec], *, targets: bool = False) -> int:
    """Return the bytes that the moments of these layers take, in float64; with the cross moments if ``targets``.

    Example:
        >>> moment_bytes({"fc": LayerSpec(kind="linear", in_channels=100, out_channels=10)})
        80800
    """
    total = 0
    for spec in specs.values():
        groups, out, *rest = spec.group_shape
        width = prod(rest)
        total += 8 * groups * (width * width + width + (out * (width + 2) if targets else 0))
    return total


def measurable(model: nn.Module) -> dict[str, LayerSpec]:
    """Return the geometry, by path, of all layers whose moments can be taken: linear layers and convolutions.

    A factorized layer counts as the dense one that it stands for. Modules that appear twice are listed once.
    """
    found: dict[str, LayerSpec] = {}
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if inside and path.startswith(inside):
            continue
        if isinstance(module, FactorizedLayer):
            found[path], inside = module.spec, (*inside, f"{path}.")
            continue
        spec, _ = describe(module)
        if spec is not None and spec.kind != "embedding":
            found[path] = spec
    return found


def collect_moments(
    model: nn.Module,
    batches: Iterable[Any],
    specs: Mapping[str, LayerSpec] | None = None,
    *,
    dense: nn.Module | None = None,
    positions: int | None = None,
    seed: int = 0,
    forward: Forward | None = None,
) -> dict[str, Moments]:
    """Return the moments of the input patches of layers, by path, from one pass over unlabeled batches.

    The model runs in evaluation mode, without gradients, and is as before afterwards. Products are taken in the dtype
    of the activations (float32 at least) and summed over batches in float64. A layer that is called several times, or
    at every position of a sequence, gives a row for each.

    Args:
        model: whose inputs are measured.
        batches: inputs as ``call_model`` takes them, on the device of the model.
        specs: the layers, with their dense geometry; all that ``measurable`` finds if None.
        dense: the dense model, when ``model`` is a compressed copy of it: then the moments also hold what the same
            layers of the dense model put out on the same batches, so that each layer can make up for those before it.
        positions: output positions taken from each map of a convolution, drawn anew for every batch; None for all. A
            few dozen are enough, because neighbours resemble each other.
        seed: of that draw.
        forward: runs the model on one batch; ``call_model`` by default.

    Raises:
        DataError: no batches, activations that are not finite, or a layer that the forward never reaches.

    Warns:
        CalibrationWarning: fewer rows than a patch is wide, which leaves the moments singular.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> moments = collect_moments(model, [torch.randn(4, 3, 8, 8)])
        >>> moments["0"].count, moments["0"].width
        (144, 27)
    """
    specs = dict(specs) if specs is not None else measurable(model)
    size = moment_bytes(specs, targets=dense is not None)
    logger.info("moments of %d layers take %.1f MiB", len(specs), size / 2**20)
    sums = {path: MomentSums() for path in specs}
    draw = _Draw(positions, seed)
    run = forward or call_model
    seen = 0
    with evaluating(model), layer_by_layer(), _watching(model, dense, specs, sums, draw):
        for seen, batch in enumerate(batches, start=1):  # noqa: B007
            if dense is not None:
                with evaluating(dense):
                    run(dense, batch)
            run(model, batch)
            draw.step += 1
    if seen == 0:
        msg = "there are no calibration batches. Pass an iterable with at least one."
        raise DataError(msg)
    found = {path: own.moments(path) for path, own in sums.items()}
    _warn_if_few(found)
    return found


@dataclass
class _Draw:
    """Which positions to take: the same in both models, others in each batch."""

    positions: int | None
    seed: int
    step: int = 0

    def options(self) -> dict[str, Any]:
        return {"positions": self.positions, "seed": self.seed * 1_000_003 + self.step}


class MomentSums:
    """Running sums of one layer in float64, to which batches are added one by one."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: dict[str, Tensor] = {}

    def add(
        self, x: Tensor, spec: LayerSpec, y: Tensor | None = None, *, positions: int | None = None, seed: int = 0
    ) -> None:
        """Add the inputs of one call, and what the layer should put out there, without its bias."""
        for part in _chunks(x, spec, positions):
            patches = input_patches(x[part], spec, positions=positions, seed=seed)
            patches = patches if patches.dtype == torch.float64 else patches.float()
            self.count += patches.shape[-1]
            self._sum("second", patches @ patches.mT)
            self._sum("mean", patches.sum(-1))
            if y is not None:
                rows = output_rows(y[part], spec, positions=positions, seed=seed).to(patches.dtype)
                self._sum("cross", rows @ patches.mT)
                self._sum("target_mean", rows.sum(-1))
                self._sum("target_power", rows.square().sum(-1))

    def _sum(self, name: str, value: Tensor) -> None:
        value = value.double()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def moments(self, path: str) -> Moments:
        """Return the moments of all that was added; ``path`` names the layer in errors.

        Raises:
            DataError: nothing was added, or it is not finite.
        """
        if self.count == 0:
            msg = f"the forward never reaches layer {path!r}: leave it out, or give batches that use it"
            raise DataError(msg)
        found = Moments(count=self.count, **{k: v / self.count for k, v in self._sums.items()})
        if not bool(torch.isfinite(found.second).all()):
            msg = f"the input of layer {path!r} is not finite: check the calibration batches and the weights before it"
            raise DataError(msg)
        return found


def _chunks(x: Tensor, spec: LayerSpec, positions: int | None) -> Iterator[slice]:
    """Iterate over slices of the batch whose patches are not too large at a time."""
    if spec.kind == "linear" or x.dim() == spec.axes + 1:
        yield slice(None)
        return
    places = prod(spec.out_shape(tuple(x.shape))) // (spec.out_channels * x.shape[0])
    taken = min(places, positions or places)
    step = max(1, _CHUNK_BYTES // (4 * taken * spec.in_channels * prod(spec.kernel)))
    for start in range(0, x.shape[0], step):
        yield slice(start, start + step)


@contextmanager
def _watching(
    model: nn.Module, dense: nn.Module | None, specs: Mapping[str, LayerSpec], sums: dict[str, MomentSums], draw: _Draw
) -> Iterator[None]:
    """Let the inputs of the layers, and the outputs of those of the dense model, add to the sums."""
    waiting: dict[str, list[Tensor]] = {path: [] for path in specs}  # outputs of the dense model, which runs first

    def entering(path: str) -> Callable[..., None]:
        def enter(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            x = next(tensors_in((args, kwargs))).detach()
            y = waiting[path].pop(0) if waiting[path] else None
            sums[path].add(x, specs[path], y, **draw.options())

        return enter

    def leaving(path: str) -> Callable[..., None]:
        def leave(module: Any, _args: Any, output: Tensor) -> None:
            y = output.detach().clone()  # an activation in place may follow
            if module.bias is not None:
                y -= module.bias.view(-1, *[1] * specs[path].axes)
            waiting[path].append(y)

        return leave

    handles = []
    try:
        for path in specs:
            if dense is not None:
                handles.append(dense.get_submodule(path).register_forward_hook(leaving(path)))
            handles.append(model.get_submodule(path).register_forward_pre_hook(entering(path), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _warn_if_few(found: Mapping[str, Moments]) -> None:
    few = {path: m for path, m in found.items() if m.count < m.width}
    if few:
        path, worst = max(few.items(), key=lambda item: item[1].width / item[1].count)
        more = -(-worst.width // worst.count)
        msg = (
            f"{len(few)} layers saw fewer rows than their patches are wide; layer {path!r} saw {worst.count} and needs "
            f"at least {worst.width}, better ten times that. Give {more} to {10 * more} times as many calibration "
            "samples, or take more positions of each."
        )
        warnings.warn(msg, CalibrationWarning, stacklevel=3)
