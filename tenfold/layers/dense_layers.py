"""Geometry and dense weight of torch layers: which of them can be factorized, and why others cannot."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from tenfold.layers.map_linear import MapLinear
from tenfold.layers.stacked import stacked_parameters
from tenfold.records import LayerSpec
from tenfold.records.geometry import LayerKind

_CONVS: dict[type[nn.Module], LayerKind] = {
    nn.Conv1d: "conv",
    nn.Conv2d: "conv",
    nn.Conv3d: "conv",
    nn.ConvTranspose1d: "conv_transpose",
    nn.ConvTranspose2d: "conv_transpose",
    nn.ConvTranspose3d: "conv_transpose",
}
_SERVED: tuple[type[nn.Module], ...] = (nn.Linear, nn.Embedding, *_CONVS)


def spec_of(module: nn.Module) -> tuple[LayerSpec | None, str]:
    """Return (spec, "") for a layer that a format could serve, else (None, the reason why none ever will).

    Example:
        >>> spec, _ = spec_of(nn.Conv2d(3, 8, 3, padding=1))
        >>> str(spec)
        'Conv2d 3→8 3×3'
        >>> spec_of(nn.ReLU())
        (None, 'ReLU has no weight to factorize')
    """
    if is_quantized(module):
        return None, _quantized(f"a quantized {type(module).__name__} packs its weights")
    base = next((t for t in _SERVED if isinstance(module, t)), None) or _transposed(module)
    if base is None:
        owns = any(True for _ in module.parameters(recurse=False))
        what = "is not a layer that tenfold factorizes" if owns else "has no weight to factorize"
        if isinstance(module, nn.RNNCellBase):
            what += "; nn.GRU and nn.LSTM are, which run one step too"
        if stacked_parameters(module):
            what = (
                "holds stacks of matrices, which compress takes apart where every product uses single ones of them and "
                "no budget limits latency"
            )
        return None, f"{type(module).__name__} {what}"
    reason = _unusual(module, base)
    if reason:
        return None, reason
    if isinstance(module, nn.Linear):
        return LayerSpec(
            kind="linear",
            in_channels=module.in_features,
            out_channels=module.out_features,
            bias=module.bias is not None,
            in_modes=module.in_modes if isinstance(module, MapLinear) else (),
        ), ""
    if isinstance(module, nn.Embedding):
        return _embedding(module)
    if _transposed(module) is not None:
        inner, outer = dense_weight(module).shape[::-1]
        return LayerSpec(kind="linear", in_channels=inner, out_channels=outer, bias=module.bias is not None), ""
    return convolution_spec(module), ""


def is_quantized(module: nn.Module) -> bool:
    """Return whether a module is one of torch's own quantized layers, whose weights are packed and no parameters."""
    home = type(module).__module__
    return home.startswith("torch.ao.nn.") and "quantized" in home.split(".")


def _quantized(what: str) -> str:
    return f"{what}, which factors cannot take over: compress the model first, then quantize it"


def _transposed(module: nn.Module) -> type[nn.Module] | None:
    """Return the class of a linear layer whose weight is (in, out): ``Conv1D`` of transformers, in GPT-2 and its kin.

    It is known by its name, so that nothing has to be imported.
    """
    kin = type(module).__mro__
    return next((t for t in kin if t.__name__ == "Conv1D" and t.__module__ == "transformers.pytorch_utils"), None)


def dense_weight(module: nn.Module) -> Tensor:
    """Return the weight of a layer that ``spec_of`` knows, or of a factorized one, as torch lays it out.

    That is a view of the parameter, for all but factorized layers: gradients flow to it. Of a ``Conv1D`` of
    transformers it is the transpose.

    Example:
        >>> dense_weight(nn.Linear(3, 2)).shape
        torch.Size([2, 3])
    """
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight if _transposed(module) is None else weight.mT


def own_layout(module: nn.Module, weight: Tensor) -> Tensor:
    """Return a weight in torch's layout as the layer itself stores it: the inverse of ``dense_weight``."""
    return weight if _transposed(module) is None else weight.mT


def _unusual(module: nn.Module, base: type[nn.Module]) -> str:
    """Return why a layer of a known kind cannot be rebuilt from its geometry and weight, or an empty string."""
    name = type(module).__name__
    if parametrize.is_parametrized(module):
        return f"the parameters of {name} are parametrized: remove the parametrization first"
    weight = module._parameters.get("weight")
    if weight is None:
        return f"the weight of {name} is computed, not a parameter of its own: remove weight_norm and the like first"
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return f"{name} is lazy and has not seen an input yet: run the model once first"
    if not weight.is_floating_point():
        return f"the weight of {name} has dtype {weight.dtype}: only floating point weights can be factorized"
    if weight.numel() == 0:
        return f"the weight of {name} is empty"
    if type(weight).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return _quantized(f"the weight of {name} is no plain tensor but of the class {type(weight).__name__}")
    if weight.element_size() == 1:
        return _quantized(f"the weight of {name} has dtype {weight.dtype}")
    return _altered(module, base)


def _altered(module: nn.Module, base: type[nn.Module]) -> str:
    """Return what a layer has or does that its base does not, or an empty string."""
    name = type(module).__name__
    others = [n for n in (*module._parameters, *module._buffers, *module._modules) if n not in ("weight", "bias")]
    if others:
        return f"{name} holds {others[0]!r} besides its weight and bias, and factors have no place for it"
    if "forward" in module.__dict__:
        return f"the forward of this {name} was replaced by another: put its own back first"
    methods = ("forward", "_conv_forward") if base in _CONVS else ("forward",)
    if any(getattr(type(module), m, None) is not getattr(base, m, None) for m in methods):
        return f"{name} is a {base.__name__} with a forward of its own"
    return ""


def _embedding(module: nn.Embedding) -> tuple[LayerSpec | None, str]:
    if module.max_norm is not None:
        return None, "an embedding with max_norm renormalises rows in place, which factors cannot"
    if module.scale_grad_by_freq:
        return None, "an embedding with scale_grad_by_freq scales gradients by rows, which factors cannot"
    return LayerSpec(
        kind="embedding",
        in_channels=module.num_embeddings,
        out_channels=module.embedding_dim,
        padding_idx=module.padding_idx,
        sparse=module.sparse,
    ), ""


def convolution_spec(module: nn.Module) -> LayerSpec:
    """Return the geometry of a convolution of torch, or of a class made from one, as its attributes say."""
    conv: Any = module
    kind = next(k for t, k in _CONVS.items() if isinstance(module, t))
    return LayerSpec(
        kind=kind,
        in_channels=conv.in_channels,
        out_channels=conv.out_channels,
        kernel=conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        output_padding=conv.output_padding,
        dilation=conv.dilation,
        groups=conv.groups,
        padding_mode=conv.padding_mode,
        bias=conv.bias is not None,
    )
