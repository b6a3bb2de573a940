"""Counter of multiply-accumulates: torch's flop counter, and the operations that it could not count."""

from __future__ import annotations

import inspect
from collections import Counter
from contextlib import AbstractContextManager
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tenfold.profiling.formulas import fused_kernels

# Operations with at most a handful of multiplications per element, like the pointwise ones that torch tags itself;
# flop counters leave them out on purpose. Names are without the underscore of in-place forms.
_CREATE = """
    arange bernoulli empty empty_like empty_strided exponential eye fill full full_like lift_fresh
    lift_fresh_copy linspace multinomial _nested_tensor_from_mask new_empty new_empty_strided new_full new_ones
    new_zeros normal ones ones_like rand rand_like randint randn randn_like randperm scalar_tensor tril_indices
    triu_indices uniform zero zeros zeros_like
"""
_MOVE = """
    cat channel_shuffle clone col2im _conj constant_pad_nd contiguous copy detach embedding embedding_renorm
    equal flip gather im2col index index_copy index_fill index_put index_select is_same_size item
    _local_scalar_dense masked_fill masked_scatter masked_select narrow_copy native_channel_shuffle nonzero
    one_hot _pack_padded_sequence _pad_packed_sequence pixel_shuffle pixel_unshuffle reflection_pad1d
    reflection_pad2d reflection_pad3d repeat repeat_interleave replication_pad1d replication_pad2d
    replication_pad3d _reshape_copy resize resize_as roll rot90 scatter select_scatter set slice_scatter
    split_copy split_with_sizes_copy stack take _to_copy to_padded_tensor tril triu unbind_copy unfold_copy
    unsafe_chunk _unsafe_index _unsafe_index_put unsafe_split unsafe_split_with_sizes _unsafe_view
    view_as_complex view_as_real
"""
_REDUCE = """
    all amax amin aminmax any argmax argmin argsort bincount bucketize count_nonzero cummax cummin cumprod
    cumsum _embedding_bag _embedding_bag_forward_only glu histc index_add kthvalue linalg_vector_norm
    _log_softmax logcumsumexp logsumexp max mean median min mode nanmean nansum norm prod _safe_softmax
    scatter_add scatter_reduce searchsorted segment_reduce _softmax sort std std_mean sum topk _unique2
    unique_consecutive unique_dim var var_mean
"""
_NORMALISE = """
    batch_norm _batch_norm_no_update _batch_norm_with_update cudnn_batch_norm _fused_rms_norm miopen_batch_norm
    native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training native_dropout
    native_group_norm native_layer_norm renorm rms_norm _thnn_fused_gru_cell _thnn_fused_lstm_cell
    _weight_norm_interface
"""
_POOL = """
    adaptive_avg_pool1d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d
    affine_grid_generator avg_pool1d avg_pool2d avg_pool3d fractional_max_pool2d fractional_max_pool3d
    grid_sampler_2d grid_sampler_3d max_pool2d_with_indices max_pool3d_with_indices max_unpool2d max_unpool3d
    mkldnn_max_pool2d upsample_bicubic2d _upsample_bicubic2d_aa upsample_bilinear2d _upsample_bilinear2d_aa
    upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d
    _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_trilinear3d
"""
_UNTAGGED_POINTWISE = """
    binary_cross_entropy binary_cross_entropy_with_logits floor_divide hardswish huber_loss _linalg_check_errors
    log_sigmoid_forward mish mse_loss _prelu_kernel rrelu_with_noise smooth_l1_loss soft_margin_loss
"""
_NEGLIGIBLE = frozenset(f"{_UNTAGGED_POINTWISE} {_CREATE} {_MOVE} {_REDUCE} {_NORMALISE} {_POOL}".split())


class MacCounter:
    """A context that counts multiply-accumulates: half of what torch's flop counter finds.

    Attributes:
        uncounted: name -> calls of operations that have no formula and may multiply and accumulate.

    Example:
        >>> import torch
        >>> with MacCounter() as counter:
        ...     _ = torch.ones(2, 3) @ torch.ones(3, 4)
        >>> counter.macs
        24
    """

    def __init__(self) -> None:
        fused = fused_kernels()
        self._fused = set(fused)
        self._flops = FlopCounterMode(display=False, custom_mapping=fused)
        # Torch follows modules through the backward pass too, which fails where a forward takes gradients itself.
        self._flops.mod_tracker = _Everything()  # type: ignore[assignment]
        self._watch = _Watch(set(self._flops.flop_registry))

    @property
    def flops(self) -> int:
        """FLOPs counted so far."""
        return self._flops.get_total_flops()

    @property
    def macs(self) -> int:
        """Multiply-accumulates counted so far: half of the FLOPs."""
        return self.flops // 2

    @property
    def fused_macs(self) -> dict[str, int]:
        """MACs by kernel for which torch's flop counter has no formula; they are part of ``macs``."""
        counts: dict[Any, int] = self._flops.get_flop_counts().get("Global", {})
        return {str(op): flops // 2 for op, flops in counts.items() if op in self._fused}

    @property
    def uncounted(self) -> dict[str, int]:
        """Operations that have no formula and may multiply and accumulate, with the number of calls."""
        return dict(sorted(self._watch.missed.items()))

    def __enter__(self) -> Self:
        # Entered first, hence called last: composite operations arrive after the counter has decomposed them.
        self._watch.__enter__()  # type: ignore[no-untyped-call]
        self._flops.__enter__()
        if self._flops.mode is not None:
            _uncompiled(self._flops.mode)
        return self

    def __exit__(self, *error: object) -> None:
        self._flops.__exit__(*error)
        self._watch.__exit__(*error)  # type: ignore[no-untyped-call]


class _Everything(AbstractContextManager[None]):
    """Stands in for what tells torch's counter which modules run: it counts for all of them together."""

    parents = ("Global",)

    def __exit__(self, *error: object) -> None:
        """Have nothing to undo."""


def _uncompiled(mode: TorchDispatchMode) -> None:
    """Keep a mode from importing torch's compiler at its first operation, which takes a second and 70 MiB."""
    raw = inspect.unwrap(type(mode).__torch_dispatch__)
    body = {"__torch_dispatch__": raw, "_should_skip_dynamo": classmethod(lambda _: False)}
    mode.__class__ = type(type(mode).__name__, (type(mode),), body)


class _Watch(TorchDispatchMode):
    """Notes the operations without a formula."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # see ``_uncompiled``

    def __init__(self, counted: set[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.missed: Counter[str] = Counter()
        self._counted = counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if getattr(func, "_overloadpacket", func) not in self._counted and costs_macs(func):
            self.missed[str(getattr(func, "_overloadpacket", func))] += 1
        return func(*args, **(kwargs or {}))


def costs_macs(op: Any) -> bool:
    """Return whether an operation may have MACs worth counting: no view, not pointwise, not negligible.

    Example:
        >>> costs_macs(torch.ops.aten.mv.default), costs_macs(torch.ops.aten.relu.default)
        (True, False)
    """
    tags = getattr(op, "tags", ())
    if torch.Tag.pointwise in tags or torch.Tag.inplace_view in tags or getattr(op, "is_view", False):
        return False
    namespace = getattr(op, "namespace", "")
    if namespace in ("prim", "profiler"):
        return False
    name = getattr(op, "_overloadpacket", op).__name__
    return not (namespace == "aten" and name.rstrip("_") in _NEGLIGIBLE)
