"""Classes of transformers in which smaller layers, and chains of them, stand where tenfold replaced dense ones.

A folder with this file opens without tenfold: ``AutoModel.from_pretrained(folder, trust_remote_code=True)``. The entry
``tenfold`` of its ``config.json`` says which layers have become what; the file itself knows no model but for
the classes at its end. It needs torch and transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

NOTE, MARK = "tenfold", {"quant_method": "tenfold"}


class DenseWeight(torch.Tensor):
    """The weight of a chain: shape, dtype and device, without entries; models ask for these in every forward."""

    _is_hf_initialized = True  # else transformers would fill it with random numbers

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Refuse to compute: nothing would be right but multiplying the whole chain out each time."""
        if func is torch.ops.aten.detach.default:
            return args[0]
        msg = "the weight of a factorized layer has no entries: call the layer, or compute with those of its stages"
        raise NotImplementedError(msg)


class Chain(nn.Module):
    """Layers that run one after the other in place of a dense one, whose public attributes they keep."""

    def __init__(self, dense: nn.Module, stages: list[dict[str, Any]]) -> None:
        super().__init__()
        vars(self).update({name: value for name, value in vars(dense).items() if not name.startswith("_")})
        like: Any = dense.weight
        self._shape = tuple(like.shape)
        self.stages = nn.ModuleList(_layer(options, like) for options in stages)

    @property
    def weight(self) -> torch.Tensor:
        """What the dense layer would answer for its weight, except its entries."""
        like: Any = self.stages[0].weight
        return torch.Tensor._make_wrapper_subclass(DenseWeight, self._shape, dtype=like.dtype, device=like.device)  # noqa: SLF001

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias, which sits on the last stage."""
        return getattr(self.stages[-1], "bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the dense layer would return."""
        for stage in self.stages:
            x = stage(x)
        return x


class PaddedHeads(nn.Module):
    """A projection to narrow heads that are filled up with zeros to the size that the attention expects.

    It is no ``nn.Linear``, in whose place some engines would put a layer of their own.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    heads: int
    full: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (..., heads·full)."""
        narrow = nn.functional.linear(x, self.weight, self.bias).unflatten(-1, (self.heads, -1))
        return nn.functional.pad(narrow, (0, self.full - narrow.shape[-1])).flatten(-2)


class UnpaddedHeads(nn.Module):
    """A projection of heads that reads their first entries alone: the others are zeros."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    heads: int
    full: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (..., out) for inputs (..., heads·full)."""
        narrow = x.unflatten(-1, (self.heads, self.full))[..., : self.weight.shape[1] // self.heads].flatten(-2)
        return nn.functional.linear(narrow, self.weight, self.bias)


class Compressed(nn.Module):
    """Base of the classes below: the stock class, with chains in place once it is built."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # the stock class comes next
        rebuild_(self, getattr(config, NOTE))

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load without the mark by which transformers would look for tenfold, and set that again."""
        if hasattr(kwargs.get("config"), "quantization_config"):
            kwargs["config"] = copy.deepcopy(kwargs["config"])
            del kwargs["config"].quantization_config
        loaded = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.config.quantization_config = dict(MARK)
        return loaded


def rebuild_(model: Any, note: dict[str, Any]) -> None:
    """Put narrower layers and chains in place of dense layers; weights that were tied to a chain no longer are.

    Paths are those of the class that was saved; here they may lie in its base model, or around it. Layers of a head
    that this class does not have are left out.
    """
    prefix = f"{model.base_model_prefix}."
    modules = dict(model.named_modules())
    gone = set()
    replaced: dict[str, list[str]] = {}
    for path in {**note["narrowed"], **note["layers"]}:
        places = (path, prefix + path, path.removeprefix(prefix))
        place = next((place for place in places if place in modules), None)
        if place is None:
            continue
        module = modules[place]
        if path in note["narrowed"]:
            module = resized(module, note["narrowed"][path], globals())
        if path in note["layers"]:
            module = Chain(module, note["layers"][path]["stages"])
            gone.add(f"{place}.weight")
        parent, _, name = place.rpartition(".")
        setattr(modules[parent], name, module)
        if type(module) is not type(modules[place]):
            replaced.setdefault(parent, []).append(name)
    for parent, names in replaced.items():
        # Engines that fuse layers (vLLM) take modules of one class and the same names of children for alike.
        if not isinstance(modules[parent], nn.ModuleList | nn.ModuleDict | nn.Sequential):
            modules[parent].add_module("replaced_" + "_".join(sorted(names)), nn.Identity())
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    if gone & {*tied, *tied.values()}:
        kept = {target: source for target, source in tied.items() if not gone & {target, source}}
        vars(model).update(all_tied_weights_keys=kept, _tied_weights_keys=kept)


def resized(module: nn.Module, change: dict[str, Any], classes: Mapping[str, Any]) -> nn.Module:
    """Return a module with parameters of other shapes, other attributes, or of another class; values do not matter."""
    new = copy.copy(module)
    if "class" in change:
        new = classes[change["class"]].__new__(classes[change["class"]])
        nn.Module.__init__(new)
        new.register_parameter("bias", None)  # unless a shape says otherwise
    like: Any = getattr(module, "weight", None)
    for table in ("_parameters", "_buffers"):
        vars(new)[table] = dict(vars(new)[table])
    for name, shape in change["shapes"].items():
        if name in module._buffers:
            new._buffers[name] = module._buffers[name].new_empty(shape)  # type: ignore[union-attr]
        else:
            new._parameters[name] = nn.Parameter(like.new_empty(shape), like.requires_grad)
    vars(new).update(change["attributes"])
    return new


def _layer(options: dict[str, Any], like: torch.Tensor) -> nn.Module:
    """Return a plain layer of torch, in the dtype and on the device of ``like``."""
    sizes = options["in_channels"], options["out_channels"]
    where: Any = {"dtype": like.dtype, "device": like.device}
    if options["kind"] == "linear":
        return nn.Linear(*sizes, bias=options.get("bias", False), **where)
    if options["kind"] == "embedding":
        return nn.Embedding(*sizes, padding_idx=options.get("padding_idx"), **where)
    names = ("stride", "padding", "dilation", "groups", "padding_mode")
    own = {name: _tuples(options[name]) for name in names if name in options}
    own |= {"kernel_size": _tuples(options["kernel"]), "bias": options.get("bias", False)} | where
    if options["kind"] == "conv_transpose":
        kind, own["output_padding"] = "ConvTranspose", _tuples(options["output_padding"])
    else:
        kind = "Conv"
    layer: nn.Module = getattr(nn, f"{kind}{len(options['kernel'])}d")(*sizes, **own)
    return layer


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
