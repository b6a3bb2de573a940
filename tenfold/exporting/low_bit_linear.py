"""Linear layers of eight or four bits by torchao, with a low-rank correction of what rounding costs their outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tenfold.calibration.collect import collect_moments
from tenfold.decompositions import Moments, algorithm_for, fit_layer
from tenfold.errors import ExportError, RankError, require
from tenfold.layers import FactorizedLayer, spec_of
from tenfold.runtimes.quiet import quiet
from tenfold.tracing import copied
from tenfold.tracing.layers import entries

Bits = Literal[4, 8]

_INT4: Any = getattr(torch, "int4", None)  # of which torch has the name alone: no stub, no arithmetic


class CorrectedLinear(nn.Module):
    """A linear layer of few bits beside two thin ones: Q(W) x + b + A B x.

    Attributes:
        base: the layer with the rounded weight Q(W), and the bias b.
        correction: the factors A B, in floating point.
    """

    def __init__(self, base: nn.Linear, correction: FactorizedLayer) -> None:
        super().__init__()
        self.base = base
        self.correction = correction
        self.in_features, self.out_features = base.in_features, base.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out) for inputs (..., in)."""
        out: Tensor = self.base(x) + self.correction(x)
        return out


def low_bit_linear(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    bits: Bits = 8,
    rank: int = 0,
    group_size: int = 32,
) -> nn.Module:
    """Return a copy of a model whose linear layers hold weights of few bits, each with a correction of low rank.

    W ≈ Q(W) + A B. Of the error E = W − Q(W) the correction takes the part of rank r that outputs feel most: with the
    second moment C = E[x xᵀ] of the inputs, A B = SVD_r(E C^½) C^-½, the optimum in closed form (QERA: Zhang et al.
    2025, arXiv 2410.06040). Without data C counts as the identity.

    Use it for inference, after compression and recovery, where memory is short: four bits with a correction of rank 8
    to 64 instead of eight bits. The factors of compressed layers are rounded too. The weights are tensors of torchao,
    which nothing else reads: keep the checkpoint in floating point, and call this after ``load``. Layers that share
    their weight with others, and those whose inputs are no multiple of the group, stay as they are. On most CPUs this
    saves memory, not time.

    Args:
        model: in evaluation mode, on its device; left unchanged.
        batches: unlabeled inputs as ``call_model`` takes them.
        bits: 8, with a scale for each output, or 4, with a scale for each group of inputs; both symmetric.
        rank: of the corrections; 0 for none. Layers of which a side is no longer than twice that get none.
        group_size: inputs that share a scale, of four bits.

    Raises:
        ExportError: the model has no linear layer that can be rounded.
        RankError: a rank below 0.
        MissingExtraError: torchao is not installed.

    Example:
        >>> dense = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).eval()
        >>> small = low_bit_linear(dense, bits=4, rank=4)
        >>> stored_bytes(small) < 0.4 * stored_bytes(dense)
        True
    """
    paths, wide = _rounded_and_corrected(model, bits, rank, group_size)
    made = copied(model)
    _round_(made, set(paths), bits, group_size)
    specs = {path: spec for path in wide if (spec := spec_of(model.get_submodule(path))[0]) is not None}
    moments = collect_moments(model, batches, specs) if batches is not None and specs else {}
    for path in wide:
        base: Any = made.get_submodule(path)
        layer = correction(dense_of(model, path), rounded(base), rank, moments.get(path))
        parent, _, name = path.rpartition(".")
        setattr(made.get_submodule(parent), name, CorrectedLinear(base, layer).train(base.training))
    return made


def low_bit_bytes(model: nn.Module, *, bits: Bits = 8, rank: int = 0, group_size: int = 32) -> int:
    """Return the bytes that ``low_bit_linear`` would leave of a model, without rounding anything: its ``stored_bytes``.

    Use it to find bits and rank that fit into a file or a memory, before data are looked at.

    Args:
        model: see ``low_bit_linear``, as for the others. The values of its weights do not matter.
        bits: 8 or 4.
        rank: of the corrections.
        group_size: inputs that share a scale, of four bits.

    Raises:
        ExportError: the model has no linear layer that can be rounded.
        RankError: a rank below 0.
        MissingExtraError: torchao is not installed.

    Example:
        >>> dense = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).eval()
        >>> low_bit_bytes(dense, bits=4, rank=4) == stored_bytes(low_bit_linear(dense, bits=4, rank=4))
        True
    """
    paths, wide = _rounded_and_corrected(model, bits, rank, group_size)
    total, scales = stored_bytes(model), dict[torch.dtype, int]()
    for path in paths:
        weight = dense_of(model, path)
        rows, width = weight.shape
        if weight.dtype not in scales:  # what torchao keeps beside the integers of a group, seen on one
            probe = nn.Sequential(nn.Linear(group_size, 1, bias=False, dtype=weight.dtype))
            _round_(probe, {"0"}, bits, group_size)
            scales[weight.dtype] = _bytes(probe[0].weight) - group_size * bits // 8
        groups = rows * (1 if bits == 8 else width // group_size)
        total += rows * width * bits // 8 + groups * scales[weight.dtype] - _bytes(weight)
        total += rank * (rows + width) * weight.element_size() if path in wide else 0
    return total


def _rounded_and_corrected(model: nn.Module, bits: Bits, rank: int, group_size: int) -> tuple[list[str], list[str]]:
    """Return which layers are rounded, and which of them get a correction."""
    if rank < 0:
        msg = f"a correction of rank {rank} is not possible: give 0 for none, or how many directions to keep"
        raise RankError(msg)
    tied = {entry.path for entry in entries(model) if entry.tied}
    paths = [path for path, m in model.named_modules() if type(m) is nn.Linear and path not in tied]
    paths = [p for p in paths if bits == 8 or model.get_submodule(p).in_features % group_size == 0]  # type: ignore[operator]
    if not paths:
        msg = f"the model has no linear layer whose weight could be rounded to {bits} bits"
        raise ExportError(msg)
    return paths, [path for path in paths if rank and min(dense_of(model, path).shape) > 2 * rank]


def correction(weight: Tensor, rounded: Tensor, rank: int, moments: Moments | None = None) -> FactorizedLayer:
    """Return the layer A B of a rank that corrects a rounded weight best, in the dtype of the weight.

    Args:
        weight: W (out, in).
        rounded: Q(W) (out, in).
        rank: of the correction.
        moments: of the inputs; None for uncorrelated ones of the same size.
    """
    algorithm = {"name": "svd"} if moments is None else {"name": "whitened_svd", "ridge": 0.0}
    error = weight.detach() - rounded.to(weight)
    about = None if moments is None else moments.uncentered()  # the bias takes no part
    found = algorithm_for("low_rank", algorithm, data_aware=moments is not None)
    fit = fit_layer(error, "low_rank", {"rank": rank}, found, moments=about)
    return FactorizedLayer.of(fit.value, requires_grad=(False, False))


def rounded(layer: nn.Linear) -> Tensor:
    """Return the weight (out, in) that a layer of few bits computes with, in floating point."""
    weight: Any = layer.weight
    made: Tensor = weight.dequantize()
    return made.detach()


def stored_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers of a model, each once; four-bit integers count as half a byte.

    torchao keeps these in a byte each on the CPU; packed, as files and other devices have them, they take half.
    """
    tensors: Mapping[int, Tensor] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(_bytes(tensor) for tensor in tensors.values())


def dense_of(model: nn.Module, path: str) -> Tensor:
    """Return the weight (out, in) of a linear layer."""
    weight: Tensor = model.get_submodule(path).weight  # type: ignore[assignment]
    return weight


def _bytes(tensor: Any) -> int:
    if not hasattr(tensor, "__tensor_flatten__"):
        return int(tensor.numel() * tensor.element_size())
    inner = {name: getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]}
    four = _INT4 is not None and getattr(tensor, "target_dtype", None) is _INT4
    return sum(
        _bytes(part) // (2 if four and name == "qdata" else 1) for name, part in inner.items() if part is not None
    )


def _round_(model: nn.Module, paths: set[str], bits: Bits, group_size: int) -> None:
    with quiet():
        torchao: Any = require("torchao.quantization", "int8")
        config = torchao.Int8WeightOnlyConfig()
        if bits == 4:
            granularity = torchao.PerGroup(group_size)
            config = torchao.IntxWeightOnlyConfig(weight_dtype=_INT4, granularity=granularity)
        torchao.quantize_(model, config, filter_fn=lambda _module, path: path in paths)
