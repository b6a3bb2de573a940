"""From a torch layer to its geometry, and from geometry to a torch layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from tenfold.layers.gather import Gather
from tenfold.records import ContractSpec, FoldedSpec, GatherSpec, LayerSpec, StageSpec

_CONVS: dict[type[nn.Module], tuple[str, int]] = {
    nn.Conv1d: ("conv", 1),
    nn.Conv2d: ("conv", 2),
    nn.Conv3d: ("conv", 3),
    nn.ConvTranspose1d: ("conv_transpose", 1),
    nn.ConvTranspose2d: ("conv_transpose", 2),
    nn.ConvTranspose3d: ("conv_transpose", 3),
}
# Products with fewer columns are run as one large one, which needs a turn of the memory.
_NARROW = 16

_SERVED: tuple[type[nn.Module], ...] = (nn.Linear, nn.Embedding, *_CONVS)


def describe(module: nn.Module) -> tuple[LayerSpec | None, str]:
    """Return (spec, "") for a layer that a format could serve, else (None, the reason why none ever will).

    Example:
        >>> spec, _ = describe(nn.Conv2d(3, 8, 3, padding=1))
        >>> str(spec)
        'Conv2d 3→8 3×3'
        >>> describe(nn.ReLU())
        (None, 'ReLU has no weight to factorize')
    """
    base = next((t for t in _SERVED if isinstance(module, t)), None) or _transposed(module)
    if base is None:
        owns = any(True for _ in module.parameters(recurse=False))
        what = "is not a layer that tenfold factorizes" if owns else "has no weight to factorize"
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
        ), ""
    if isinstance(module, nn.Embedding):
        return _embedding(module)
    if _transposed(module) is not None:
        inner, outer = dense_weight(module).shape[::-1]
        return LayerSpec(kind="linear", in_channels=inner, out_channels=outer, bias=module.bias is not None), ""
    return _convolution(module), ""


def _transposed(module: nn.Module) -> type[nn.Module] | None:
    """Return the class of a linear layer whose weight is (in, out): ``Conv1D`` of transformers, in GPT-2 and its kin.

    It is known by its name, so that nothing has to be imported.
    """
    kin = type(module).__mro__
    return next((t for t in kin if t.__name__ == "Conv1D" and t.__module__ == "transformers.pytorch_utils"), None)


def dense_weight(module: nn.Module) -> Tensor:
    """Return the weight of a layer that ``describe`` knows, or of a factorized one, as torch lays it out.

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


def _convolution(module: nn.Module) -> LayerSpec:
    conv: Any = module
    kind, _ = next(v for t, v in _CONVS.items() if isinstance(module, t))
    return LayerSpec.model_validate(
        {
            "kind": kind,
            "in_channels": conv.in_channels,
            "out_channels": conv.out_channels,
            "kernel": conv.kernel_size,
            "stride": conv.stride,
            "padding": conv.padding,
            "output_padding": conv.output_padding,
            "dilation": conv.dilation,
            "groups": conv.groups,
            "padding_mode": conv.padding_mode,
            "bias": conv.bias is not None,
        }
    )


class Contract(nn.Module):
    """One einsum over the features of its input, with one weight; see ``ContractSpec``.

    A product with the middle one of three modes runs without a copy where the memory allows it: what stands before
    goes into the batch, what stands after into the positions, and the rest is a batch of products with one matrix. With
    the few channels of a train that is up to ten times faster than a 1×1 convolution on the same memory.
    """

    bias: nn.Parameter | None

    def __init__(self, spec: ContractSpec, weight: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.spec = spec
        self._outputs = spec.out_channels  # worked out from the equation: nothing that a compiler could trace
        self.weight = weight
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the contraction, its feature modes flattened into one axis again."""
        spec = self.spec
        place = x.dim() - 1 - spec.axes
        if spec.is_middle:
            sides = x.shape[place + 1 :]
            out = self._middle(x, sides.numel()).reshape(*x.shape[:place], self._outputs, *sides)
        else:
            apart = x.unflatten(place, spec.modes)
            out = torch.einsum(_behind(spec.equation, spec.axes), apart, self.weight)
            out = out.flatten(place, out.dim() - 1 - spec.axes)
        return out if self.bias is None else out + self.bias.view(-1, *(1,) * spec.axes)

    def _middle(self, x: Tensor, positions: int) -> Tensor:
        """Return the product, as (whatever stands before, rows of the weight, whatever stands after)."""
        _, inner, after = self.spec.modes
        width = after * positions
        if width == 1:
            return functional.linear(x.reshape(-1, inner), self.weight)
        folded = x.reshape(-1, inner, width)
        if width < _NARROW:
            return functional.linear(folded.mT, self.weight).mT
        count = folded.shape[0]  # len() is a number, also where the size of the batch is to stay open
        return torch.bmm(self.weight.expand(count, -1, -1), folded)

    def extra_repr(self) -> str:
        """Return the modes and the equation."""
        return f"{self.spec.modes}, {self.spec.equation!r}"


class Folded(nn.Module):
    """One layer that all slices of the channels go through alike, as if each were an input of its own."""

    def __init__(self, layer: nn.Module, copies: int) -> None:
        super().__init__()
        self.layer = layer
        self.copies = copies

    @property
    def weight(self) -> Tensor:
        """The weight of the layer, the same for all slices."""
        layer: Any = self.layer
        weight: Tensor = layer.weight
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of the layer for each slice, slice after slice."""
        layer: Any = self.layer
        place = x.dim() - 1 - len(layer.kernel_size)
        out = layer(x.unflatten(place, (self.copies, -1)).flatten(0, place))
        slices: Tensor = out.unflatten(0, (*x.shape[:place], self.copies)).flatten(place, place + 1)
        return slices


def _behind(equation: str, axes: int) -> str:
    """Return the equation with letters for the spatial axes, which stand behind the features."""
    inputs, out = equation.split("->")
    features, weight = inputs.split(",")
    sides = "XYZ"[:axes]
    return f"{features}{sides},{weight}->{out}{sides}"


def build(spec: StageSpec, weight: nn.Parameter, bias: nn.Parameter | None = None) -> nn.Module:
    """Return a plain torch layer with this geometry that holds just these parameters.

    Args:
        spec: the geometry.
        weight: in torch's own layout, of shape ``spec.weight_shape``.
        bias: of shape (out_channels,), present exactly when ``spec.bias``.
    """
    if isinstance(spec, ContractSpec):
        return Contract(spec, weight, bias)
    if isinstance(spec, GatherSpec):
        return Gather(spec, weight)
    if isinstance(spec, FoldedSpec):
        return Folded(build(spec.layer, weight, bias), spec.copies)
    layer: nn.Module
    if spec.kind == "linear":
        layer = nn.Linear(spec.in_channels, spec.out_channels, bias=spec.bias, device="meta")
    elif spec.kind == "embedding":
        layer = nn.Embedding(
            spec.in_channels, spec.out_channels, padding_idx=spec.padding_idx, sparse=spec.sparse, device="meta"
        )
    else:
        layer = _build_convolution(spec)
    layer.register_parameter("weight", weight)
    if spec.bias:
        layer.register_parameter("bias", bias)
    return layer


def _build_convolution(spec: LayerSpec) -> nn.Module:
    options: dict[str, Any] = {
        "kernel_size": spec.kernel,
        "stride": spec.stride,
        "padding": spec.padding,
        "dilation": spec.dilation,
        "groups": spec.groups,
        "padding_mode": spec.padding_mode,
        "bias": spec.bias,
        "device": "meta",
    }
    if spec.kind == "conv_transpose":
        options["output_padding"] = spec.output_padding
    base: Any = next(t for t, v in _CONVS.items() if v == (spec.kind, spec.axes))
    layer: nn.Module = base(spec.in_channels, spec.out_channels, **options)
    return layer
