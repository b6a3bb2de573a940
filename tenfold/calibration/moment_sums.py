"""Running sums of one layer's input moments in float64: exact, sketched, or counts of ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from tenfold.calibration.correlation import PatchGram, covers, patch_cross, patch_sum
from tenfold.calibration.im2col import drawn_patches, input_patches, output_rows
from tenfold.calibration.shares import Together
from tenfold.calibration.sketched_moments import SketchSums, sketch_size
from tenfold.decompositions import Moments, Sketch
from tenfold.decompositions.covariance import blocks
from tenfold.errors import DataError
from tenfold.records import LayerSpec
from tenfold.tensors import plain_arithmetic, squarable
from tenfold.tracing.masks import real_tokens

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
        rows = sketch_rows(spec, widest)
        if rows is None:
            total += 8 * groups * (width * width + width + (out * (width + 2) if targets else 0))
        else:
            total += 8 * groups * ((rows + 1) * (width + 1) + 2 * width + (out * (rows + 3) if targets else 0))
            total += 4 * width * rows
    return total


def sketch_rows(spec: LayerSpec, widest: int | None) -> int | None:
    """Return the number of rows of a layer's sketch, or None if its second moment is exact."""
    if spec.kind == "embedding":
        return None
    limit, width = WIDEST if widest is None else widest, prod(spec.group_shape[2:])
    return None if width <= limit else sketch_size(width, limit)


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
        self._maps: PatchGram | None = None
        self._counts: Tensor | None = None

    @plain_arithmetic()
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
        x, y = _prepared(x, y, spec)
        size = sketch_rows(spec, self._widest)
        if size is not None and self._sketch is None:
            self._sketch = SketchSums(size, self._seed)
        elif size is None and covers(x, spec, positions):
            self._add_maps(x, y)
            return
        for part in _chunks(x, spec, positions):
            taps_first = None
            if self._sketch is None and spec.kind != "linear" and spec.groups == 1:
                taps_first = drawn_patches(x[part], spec, positions=positions, seed=seed)
            if taps_first is None:
                patches = input_patches(x[part], spec, positions=positions, seed=seed)
            else:
                patches = taps_first.flatten(1).t()[None]
            self.count += patches.shape[-1]
            rows = None
            if y is not None:
                rows = output_rows(y[part], spec, positions=positions, seed=seed)
            if self._sketch is None:
                self._add(patches, rows, taps=1 if taps_first is None else taps_first.shape[1])
            else:
                self._sketch.add(patches, rows)

    def _add(self, patches: Tensor, rows: Tensor | None, taps: int) -> None:
        """Add patches whose entries lie in the order (tap, channel), for ``taps`` above 1."""
        self._sum("input_second_moment", _channels_first(_channels_first(_square(patches), taps).mT, taps))
        self._sum("mean", _channels_first(patches.sum(-1), taps))
        if rows is not None:
            if "cross" not in self._sums:
                self._sums["cross"] = rows.new_zeros(*rows.shape[:2], patches.shape[1], dtype=torch.float64)
            cross = self._sums["cross"]
            for part in blocks(cross):
                cross[:, part] += _channels_first(rows[:, part] @ patches.mT, taps)
            self._sum("target_mean", rows.sum(-1))
            self._sum("target_power", torch.cat([rows[:, part].square().sum(-1) for part in blocks(cross)], dim=1))

    def _add_maps(self, x: Tensor, y: Tensor | None) -> None:
        """Add all patches of whole maps without extracting them."""
        self.count += x.shape[0] * prod(x.shape[2:])
        self._maps = self._maps or PatchGram()
        self._maps.add(x)
        self._sum("mean", patch_sum(x))
        if y is not None:
            self._sum("cross", patch_cross(y, x))
            self._sum("target_mean", y.sum((0, 2, 3))[None])
            self._sum("target_power", y.square().sum((0, 2, 3))[None])

    def _sum(self, name: str, value: Tensor) -> None:
        if name in self._sums:
            self._sums[name].add_(value)
        else:
            self._sums[name] = value.double()

    def gather(self, together: Together, spec: LayerSpec) -> None:
        """Make these the sums of all processes, each of which calls this."""
        self.count = sum(together.everyones(self.count))
        size = sketch_rows(spec, self._widest)
        if size is not None:
            self._sketch = self._sketch or SketchSums(size, self._seed)
            self._sketch.gather(together)
            return
        maps = {} if self._maps is None else self._maps.sums
        counts = {} if self._counts is None else {"": self._counts}
        self._sums, maps, counts = (together.summed(own) for own in (self._sums, maps, counts))
        self._maps = PatchGram(maps) if maps else None
        self._counts = counts.get("")

    @plain_arithmetic()
    def moments(self, path: str) -> Moments:
        """Return the moments of all rows; ``path`` names the layer in errors. Frees the sums: add nothing afterwards.

        Raises:
            DataError: nothing was added, or it is not finite.
        """
        if self.count == 0:
            msg = f"the forward never reaches layer {path!r}: leave it out, or give batches that use it"
            raise DataError(msg)
        if self._counts is not None:
            return moments_of_ids(self._counts)
        if self._maps is not None:
            self._sum("input_second_moment", self._maps.value())
            self._maps = None
        sketch = self._sketch
        if not (bool(torch.isfinite(self._sums["input_second_moment"]).all()) if sketch is None else sketch.finite()):
            finite = "mean" in self._sums and bool(torch.isfinite(self._sums["mean"]).all())
            what = "so large that its squares overflow float64" if finite else "not finite"
            msg = f"the input of layer {path!r} is {what}: check the calibration batches and the weights before it"
            raise DataError(msg)
        if sketch is not None:
            return sketch.moments()
        means: dict[str, Any] = {k: self._sums.pop(k).div_(self.count) for k in list(self._sums)}
        return Moments(count=self.count, **means)


def _prepared(x: Tensor, y: Tensor | None, spec: LayerSpec) -> tuple[Tensor, Tensor | None]:
    """Return inputs and targets in the dtype that their products are computed in, maps with one axis of samples."""
    extra = x.dim() - spec.axes - 2  # axes of a vmap
    if spec.axes and extra > 0:
        x, y = x.flatten(0, extra), None if y is None else y.flatten(0, extra)
    x = squarable(x)
    if y is None:
        return x, None
    y = squarable(y)
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(dtype)


def _channels_first(values: Tensor, taps: int) -> Tensor:
    """Bring the last axis from the order (tap, channel) into (channel, tap)."""
    return values if taps == 1 else values.unflatten(-1, (taps, -1)).transpose(-1, -2).flatten(-2)


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


def id_counts(ids: Tensor, rows: int, counts: Tensor | None = None) -> Tensor:
    """Count how often each id below ``rows`` occurs (rows,), in float64, on top of earlier ``counts``.

    Example:
        >>> id_counts(torch.tensor([[0, 2], [2, 2]]), 4).tolist()
        [1.0, 0.0, 3.0, 0.0]
    """
    own = torch.bincount(ids.flatten().long(), minlength=rows).double()
    return own if counts is None else counts + own


def frequencies(counts: Tensor) -> Tensor:
    """Return the probabilities (n,) of ids with these counts (n,), smoothed for ids that were never seen.

    All unseen ids together get the weight of all ids seen once (Good 1953, Biometrika 40: the probability that the next
    id is a new one), or of one such id if there is none; it is spread evenly, each at most half an id seen once.

    Example:
        >>> (18 * frequencies(torch.tensor([6.0, 1.0, 1.0, 0.0, 0.0]))).tolist()
        [12.0, 2.0, 2.0, 1.0, 1.0]
    """
    unseen = counts == 0
    once = (counts == 1).sum().clamp_min(1).to(counts)
    each = (once / unseen.sum().clamp_min(1)).clamp_max(0.5)
    smooth = torch.where(unseen, each, counts)
    return smooth / smooth.sum()


def moments_of_ids(counts: Tensor) -> Moments:
    """Return the moments of the one-hot inputs of an embedding: a diagonal (1, n, n), of which only n are stored.

    They are uncentered, because an embedding has no bias to absorb a shift of the mean.

    Args:
        counts: how often each id was seen (n,), as ``id_counts`` returns it.

    Example:
        >>> moments_of_ids(torch.tensor([2.0, 1.0, 1.0])).covariance().diagonal().tolist()
        [[0.5, 0.25, 0.25]]
    """
    rest = frequencies(counts)[None]
    empty = rest.new_zeros(1, 0, rest.shape[1])
    return Moments(Sketch(empty, rest, rest.new_zeros(1, 0)), torch.zeros_like(rest), int(counts.sum()))
