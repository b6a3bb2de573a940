"""First and second moments of layer inputs, collected in one pass over unlabeled batches."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.calibration.correlation import covers, patch_cross, patch_square, patch_sum
from tenfold.calibration.frequencies import id_counts, moments_of_ids
from tenfold.calibration.im2col import input_patches, output_rows
from tenfold.calibration.sketched_moments import SketchSums, sketch_size
from tenfold.decompositions import Moments
from tenfold.errors import CalibrationWarning, DataError
from tenfold.layers import FactorizedLayer, spec_of
from tenfold.records import LayerSpec
from tenfold.tracing.contexts import evaluating, layer_by_layer
from tenfold.tracing.inputs import call_model, real_tokens, tensors_in, token_mask

logger = logging.getLogger("tenfold")

Forward = Callable[[nn.Module, Any], object]

# Second moments of wider patches are sketched. One of this width takes 512 MiB, and a sketch at most as much.
WIDEST = 8192

# Patches are extracted for as many samples at a time as fit into this many bytes.
_CHUNK_BYTES = 1 << 27

# Squares of matrices narrower than this are faster whole than by halves.
_BLOCK = 96


def moment_bytes(specs: Mapping[str, LayerSpec], *, targets: bool = False, widest: int | None = None) -> int:
    """Return an upper bound on the bytes that the moments of these layers take in float64.

    Patches of n ≤ ``widest`` entries take slightly more than 8·n²; wider ones 8·k·n for a sketch of k·n ≤ ``widest``²
    entries, plus 4·k·n for its projection during collection. An embedding of n rows takes 24·n: counts and frequencies.

    Args:
        specs: the layers.
        targets: include the outputs of the same layers of a dense model.
        widest: width beyond which moments are sketched, 8192 by default: √(bytes/8) for a limit in bytes per layer.

    Example:
        >>> moment_bytes({"fc": LayerSpec(kind="linear", in_channels=100, out_channels=10)})
        80800
        >>> moment_bytes({"fc": LayerSpec(kind="linear", in_channels=25088, out_channels=4096)}) // 2**20  # MiB
        768
    """
    total = 0
    for spec in specs.values():
        groups, out, *rest = spec.group_shape
        width = prod(rest)
        if spec.kind == "embedding":
            total += 24 * width
            continue
        rows = _sketch_rows(spec, widest)
        if rows is None:
            total += 8 * groups * (width * width + width + (out * (width + 2) if targets else 0))
        else:
            total += 8 * groups * ((rows + 1) * (width + 1) + 2 * width + (out * (rows + 3) if targets else 0))
            total += 4 * width * rows
    return total


def _sketch_rows(spec: LayerSpec, widest: int | None) -> int | None:
    """Return the number of rows of a layer's sketch, or None if its second moment is exact."""
    if spec.kind == "embedding":
        return None
    limit, width = WIDEST if widest is None else widest, prod(spec.group_shape[2:])
    return None if width <= limit else sketch_size(width, limit)


def measurable(model: nn.Module) -> dict[str, LayerSpec]:
    """Return the geometry, by path, of all layers with measurable inputs: linear layers, convolutions, embeddings.

    A factorized layer counts as the dense one that it replaces. Modules that appear twice are listed once.
    """
    found: dict[str, LayerSpec] = {}
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if inside and path.startswith(inside):
            continue
        if isinstance(module, FactorizedLayer):
            found[path], inside = module.spec, (*inside, f"{path}.")
            continue
        spec, _ = spec_of(module)
        if spec is not None:
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
    widest: int | None = None,
    forward: Forward | None = None,
) -> dict[str, Moments]:
    """Collect the moments of the input patches of layers, by path, in one pass over unlabeled batches.

    The model runs in evaluation mode, without gradients, and is unchanged afterwards. Products are computed in the
    dtype of the activations (float32 at least) and summed in float64. Each call of a layer and each position of a
    sequence is a row. For an embedding the ids are counted: see ``MomentSums.add``. If a batch has the keyword
    ``attention_mask`` (batch, sequence), padding contributes no rows.

    Args:
        model: whose inputs are measured.
        batches: inputs as ``call_model`` takes them, on the device of the model.
        specs: the layers, with their dense geometry; all that ``measurable`` finds if None.
        dense: the dense model, if ``model`` is a compressed copy of it: the moments then also hold the outputs of the
            same layers of the dense model on the same batches, so that each layer can correct errors of those before.
        positions: output positions sampled from each map of a convolution, other ones for every batch; None for all.
            A few dozen are enough, because neighbouring positions are correlated.
        seed: of the positions and the sketches.
        widest: second moments of patches wider than this are sketched, see ``moment_bytes``; 8192 by default.
        forward: runs the model on one batch; ``call_model`` by default.

    Raises:
        DataError: no batches, activations that are not finite, or a layer that the forward never reaches.

    Warns:
        CalibrationWarning: fewer rows than a patch has entries, which makes the moments singular.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> moments = collect_moments(model, [torch.randn(4, 3, 8, 8)])
        >>> moments["0"].count, moments["0"].width
        (144, 27)
    """
    specs = dict(specs) if specs is not None else measurable(model)
    _announce(specs, targets=dense is not None, widest=widest)
    sums = {path: MomentSums(widest, seed) for path in specs}
    draw = _Draw(positions, seed)
    run = forward or call_model
    seen = 0
    with evaluating(model), layer_by_layer(), _watching(model, dense, specs, sums, draw):
        for seen, batch in enumerate(batches, start=1):  # noqa: B007
            draw.mask = token_mask(batch)
            if dense is not None:
                with evaluating(dense):
                    run(dense, batch)
            run(model, batch)
            draw.step += 1
    if seen == 0:
        msg = "there are no calibration batches. Pass an iterable with at least one."
        raise DataError(msg)
    found = {path: own.moments(path) for path, own in sums.items()}
    _warn_if_few({path: own for path, own in found.items() if specs[path].kind != "embedding"})
    return found


def _announce(specs: Mapping[str, LayerSpec], *, targets: bool, widest: int | None) -> None:
    size = moment_bytes(specs, targets=targets, widest=widest)
    logger.info("moments of %d layers take %.1f MiB", len(specs), size / 2**20)
    for path, spec in specs.items():
        rows = _sketch_rows(spec, widest)
        if rows is not None:
            width = prod(spec.group_shape[2:])
            logger.info("layer %r: inputs %d wide, of which a sketch of %d rows is kept", path, width, rows)


@dataclass
class _Draw:
    """Positions and tokens to sample: the same in both models, different in each batch."""

    positions: int | None
    seed: int
    step: int = 0
    mask: Tensor | None = None  # which tokens of the batch are real

    def options(self) -> dict[str, Any]:
        return {"positions": self.positions, "seed": self.seed * 1_000_003 + self.step, "mask": self.mask}


class MomentSums:
    """Running sums of one layer in float64, to which batches are added one by one.

    Args:
        widest: second moments of patches wider than this are sketched, see ``moment_bytes``; 8192 by default.
        seed: of the sketch.
    """

    def __init__(self, widest: int | None = None, seed: int = 0) -> None:
        self.count = 0
        self._widest, self._seed = widest, seed
        self._sums: dict[str, Tensor] = {}
        self._sketch: SketchSums | None = None
        self._counts: Tensor | None = None

    def add(
        self,
        x: Tensor,
        spec: LayerSpec,
        y: Tensor | None = None,
        *,
        positions: int | None = None,
        seed: int = 0,
        mask: Tensor | None = None,
    ) -> None:
        """Add the inputs of one call, and the target outputs of the layer, without its bias.

        Inputs of an embedding are ids, which stand for one-hot rows: their second moment is diagonal and holds the
        counts of the ids. Targets of an embedding do not depend on other layers, so ``y`` is ignored there. With a
        ``mask`` of real tokens (batch, sequence), only these are counted.
        """
        if spec.kind in {"linear", "embedding"}:
            features = spec.kind == "linear"
            y = None if y is None else real_tokens(y, mask)
            x = real_tokens(x, mask, features=features)
        if spec.kind == "embedding":
            self._counts = id_counts(x, spec.in_channels, self._counts)
            self.count += x.numel()
            return
        size = _sketch_rows(spec, self._widest)
        if size is not None and self._sketch is None:
            self._sketch = SketchSums(size, self._seed)
        elif size is None and covers(x, spec, positions):
            self._add_maps(x, y)
            return
        for part in _chunks(x, spec, positions):
            patches = input_patches(x[part], spec, positions=positions, seed=seed)
            patches = patches if patches.dtype == torch.float64 else patches.float()
            self.count += patches.shape[-1]
            rows = None
            if y is not None:
                rows = output_rows(y[part], spec, positions=positions, seed=seed).to(patches.dtype)
            if self._sketch is None:
                self._add(patches, rows)
            else:
                self._sketch.add(patches, rows)

    def _add(self, patches: Tensor, rows: Tensor | None) -> None:
        self._sum("input_second_moment", _square(patches))
        self._sum("mean", patches.sum(-1))
        if rows is not None:
            self._sum("cross", rows @ patches.mT)
            self._sum("target_mean", rows.sum(-1))
            self._sum("target_power", rows.square().sum(-1))

    def _add_maps(self, x: Tensor, y: Tensor | None) -> None:
        """Add all patches of whole maps, which need not be made for that."""
        x = x if x.dtype == torch.float64 else x.float()
        self.count += x.shape[0] * prod(x.shape[2:])
        self._sum("second", patch_square(x))
        self._sum("mean", patch_sum(x))
        if y is not None:
            y = y.to(x.dtype)
            self._sum("cross", patch_cross(y, x))
            self._sum("target_mean", y.sum((0, 2, 3))[None])
            self._sum("target_power", y.square().sum((0, 2, 3))[None])

    def _sum(self, name: str, value: Tensor) -> None:
        if name in self._sums:
            self._sums[name].add_(value)
        else:
            self._sums[name] = value.double()

    def moments(self, path: str) -> Moments:
        """Return the moments of all rows added so far; ``path`` names the layer in errors.

        Raises:
            DataError: nothing was added, or it is not finite.
        """
        if self.count == 0:
            msg = f"the forward never reaches layer {path!r}: leave it out, or give batches that use it"
            raise DataError(msg)
        if self._counts is not None:
            return moments_of_ids(self._counts)
        sketch = self._sketch
        if not (bool(torch.isfinite(self._sums["input_second_moment"]).all()) if sketch is None else sketch.finite()):
            msg = f"the input of layer {path!r} is not finite: check the calibration batches and the weights before it"
            raise DataError(msg)
        if sketch is not None:
            return sketch.moments()
        return Moments(count=self.count, **{k: v / self.count for k, v in self._sums.items()})


def _square(rows: Tensor) -> Tensor:
    """Return A Aᵀ (groups, n, n) of A (groups, n, rows). It dominates the cost, so only one triangle is computed."""
    groups, width, _ = rows.shape
    if width <= _BLOCK:
        return rows @ rows.mT
    half = width // 2
    square = rows.new_empty(groups, width, width)
    square[:, :half, :half] = _square(rows[:, :half])
    square[:, half:, half:] = _square(rows[:, half:])
    square[:, half:, :half] = rows[:, half:] @ rows[:, :half].mT
    square[:, :half, half:] = square[:, half:, :half].mT
    return square


def _chunks(x: Tensor, spec: LayerSpec, positions: int | None) -> Iterator[slice]:
    """Iterate over slices of the batch whose patches fit into memory together."""
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
    """Add the inputs of the layers, and the outputs of the dense model's layers, to the sums."""
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
            if getattr(module, "bias", None) is not None:
                y -= module.bias.view(-1, *[1] * specs[path].axes)
            waiting[path].append(y)

        return leave

    with ExitStack() as stack:
        for path in specs:
            if dense is not None:
                stack.enter_context(dense.get_submodule(path).register_forward_hook(leaving(path), prepend=True))
            layer = model.get_submodule(path)
            stack.enter_context(layer.register_forward_pre_hook(entering(path), with_kwargs=True))
        yield


def _warn_if_few(found: Mapping[str, Moments]) -> None:
    few = {path: m for path, m in found.items() if m.count < m.width}
    if few:
        path, worst = max(few.items(), key=lambda item: item[1].width / item[1].count)
        more = -(-worst.width // worst.count)
        layers = f"{len(few)} layer{'s' * (len(few) > 1)}"
        msg = (
            f"{layers} saw fewer rows than patches are wide; layer {path!r} saw {worst.count} and needs at least "
            f"{worst.width}, better ten times that. Give {more} to {10 * more} times as many calibration samples, or "
            "take more positions of each."
        )
        warnings.warn(msg, CalibrationWarning, stacklevel=3)
