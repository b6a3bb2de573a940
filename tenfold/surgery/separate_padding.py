"""Find convolutions of a class of their own that do nothing but pad first, and put a plain convolution behind the pad.

They are known by what they compute, not by their class: ``Conv2dSame`` of timm, causal convolutions, those of static
padding. One that standardises its weight, or activates its output, is none of these.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tenfold.layers import PaddedConv, build, is_quantized, same_pads, spec_of
from tenfold.layers.dense_layers import convolution_spec
from tenfold.layers.padded_conv import SAME
from tenfold.records import LayerSpec
from tenfold.surgery.modules import find, put
from tenfold.tracing import copied
from tenfold.tracing.contexts import evaluating, layer_by_layer, same_random_numbers
from tenfold.tracing.inputs import call_model
from tenfold.tracing.randomness import Randomness

_KIND = "padding "
_PLAIN = {nn.Conv1d: functional.conv1d, nn.Conv2d: functional.conv2d, nn.Conv3d: functional.conv3d}

Pads = tuple[int, ...] | str


def padded_convs(model: nn.Module) -> dict[str, str]:
    """Return the paths of convolutions that only pad first, each with ``"padding "`` and the zeros around the input.

    Each is called on a few small inputs, on a copy with random weights.

    Example:
        >>> class Causal(nn.Conv1d):
        ...     def forward(self, x):
        ...         return super().forward(functional.pad(x, (2, 0)))
        >>> padded_convs(nn.Sequential(Causal(4, 4, 3), nn.Conv1d(4, 4, 3)))
        {'0': 'padding 2 0'}
    """
    found = {path: _pads(module) for path, module in model.named_modules() if _may_pad(module)}
    return {path: _kind(pads) for path, pads in found.items() if pads is not None}


def separated_convs(model: nn.Module) -> dict[str, str]:
    """Return the paths of convolutions whose padding is separate, each with its padding as ``padded_convs`` has it."""
    return {path: _kind(_all_pads(m)) for path, m in model.named_modules() if isinstance(m, PaddedConv)}


def confirmed(model: nn.Module, kinds: Mapping[str, str], inputs: Any) -> dict[str, str]:
    """Return those of ``padded_convs`` that pad in this way in a real forward too, with every input that they get."""
    agrees: dict[str, bool] = {}

    def check(path: str) -> Callable[..., None]:
        def compare(conv: nn.Module, args: Any, out: Any) -> None:
            agrees[path] = (
                agrees.get(path, True) and len(args) == 1 and _explains(conv, _read(kinds[path]), args[0], out)
            )

        return compare

    handles = [find(model, path).register_forward_hook(check(path), prepend=True) for path in kinds]
    try:
        if handles:
            with evaluating(model), layer_by_layer(), Randomness(model, inputs).seeded(0):
                call_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {path: kind for path, kind in kinds.items() if agrees.get(path)}


def is_padding(kind: str) -> bool:
    """Whether the kind of a layer in a plan is the padding of a convolution."""
    return kind.startswith(_KIND)


def separate_padding_(model: nn.Module, kinds: dict[str, str]) -> nn.Module:
    """Put plain convolutions with a padding before them in place of those at the given paths; return the model.

    The parameters stay the same objects. Those that are separate already stay so.
    """
    new: dict[str, nn.Module] = {}
    for path, kind in kinds.items():
        old: Any = find(model, path)
        if not isinstance(old, PaddedConv):
            new[path] = _separated(old, _read(kind))
    return put(model, new)


def _kind(pads: Pads) -> str:
    return _KIND + (pads if isinstance(pads, str) else " ".join(map(str, pads)))


def _read(kind: str) -> Pads:
    text = kind.removeprefix(_KIND)
    return SAME if text == SAME else tuple(int(n) for n in text.split())


def _all_pads(layer: Any) -> Pads:
    """Return the zeros that a layer puts around its input, with those that its convolution puts there."""
    if isinstance(layer.pads, str):
        return layer.pads
    own = [n for n in reversed(layer.conv.padding) for _ in range(2)]
    return tuple(a + b for a, b in zip(layer.pads, own, strict=True))


def _separated(conv: Any, pads: Pads) -> PaddedConv:
    """Return the same convolution, which pads what is alike on both sides itself, behind a padding of the rest."""
    spec, rest = _unpadded(conv), pads
    if isinstance(pads, tuple):
        both = [min(pads[i : i + 2]) for i in range(0, len(pads), 2)]
        spec = spec.replace(padding=tuple(reversed(both)))
        rest = tuple(n - both[i // 2] for i, n in enumerate(pads))
    return PaddedConv(build(spec, conv.weight, conv.bias), rest)


def _may_pad(module: nn.Module) -> bool:
    """Whether a module is a convolution of a class of its own, with nothing to it but weight and bias."""
    base = next((kind for kind in _PLAIN if isinstance(module, kind)), None)
    if base is None or spec_of(module)[0] is not None or "forward" in module.__dict__ or is_quantized(module):
        return False
    own = [name for name, _ in itertools.chain(module.named_parameters(), module.named_buffers())]
    weight = module._parameters.get("weight")
    plain = type(weight) is nn.Parameter and weight.is_floating_point() and weight.element_size() > 1
    return plain and set(own) <= {"weight", "bias"} and getattr(module, "padding_mode", "") == "zeros"


def _unpadded(conv: Any) -> LayerSpec:
    return convolution_spec(conv).replace(padding=(0,) * len(conv.kernel_size))


def _pads(module: nn.Module) -> Pads | None:
    """Return the zeros that a convolution puts around its input; None if it does anything else."""
    probe: Any = copied(module).to_empty(device="cpu").float()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad(), evaluating(probe), same_random_numbers(torch.device("cpu")):
        for parameter in probe.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
        try:
            runs = [(x, probe(x)) for x in _inputs(probe, draw)]
            probe.train()  # what it does in training only would be lost
            runs.append((runs[-1][0], probe(runs[-1][0])))
        except Exception:  # noqa: BLE001 - whatever it wants, it is no convolution of its input
            return None
        if not all(isinstance(out, Tensor) and out.dim() == x.dim() for x, out in runs):
            return None
        return next((pads for pads in _candidates(probe, runs) if all(_explains(probe, pads, *r) for r in runs)), None)


def _inputs(conv: Any, draw: torch.Generator) -> Iterator[Tensor]:
    """Yield inputs of sizes with every remainder by the stride, and one that is longer along one axis."""
    reach = [d * (k - 1) + 1 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    for more in range(max(conv.stride) + 1):
        yield torch.randn(2, conv.in_channels, *(2 * r + more for r in reach), generator=draw)
    yield torch.randn(1, conv.in_channels, 3 * reach[0] + 4, *(2 * r for r in reach[1:]), generator=draw)


def _candidates(conv: Any, runs: list[tuple[Tensor, Tensor]]) -> Iterator[Pads]:
    """Yield the paddings that would make outputs of the right sizes."""
    sides = []
    for axis, (k, s, d) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)):
        needed = [(out.shape[2 + axis] - 1) * s + d * (k - 1) + 1 - x.shape[2 + axis] for x, out in runs]
        total = max(needed)
        fits = total < min(needed) + s and total >= 0
        lefts = dict.fromkeys([total // 2, total, *range(total)]) if fits else {}  # the usual ones first
        sides.append([(left, total - left) for left in lefts])
    for chosen in itertools.product(*sides):
        yield tuple(n for side in reversed(chosen) for n in side)
    yield SAME


def _explains(conv: Any, pads: Pads, x: Tensor, out: Tensor) -> bool:
    """Whether an output is the plain convolution of the padded input; one channel of it tells in most cases."""
    if not isinstance(out, Tensor) or out.dim() != x.dim() or x.dim() != len(conv.kernel_size) + 2:
        return False
    run = next(function for kind, function in _PLAIN.items() if isinstance(conv, kind))
    close = 1e-3 if out.element_size() > 2 else 2e-2  # kernels differ; those of CUDA round inputs to ten bits
    zeros = same_pads(conv, tuple(x.shape[2:])) if isinstance(pads, str) else pads
    padded = functional.pad(x, zeros)
    bias = conv.bias

    def agrees(channels: int, groups: int) -> bool:
        inputs = padded[:, : conv.in_channels // conv.groups * groups]
        own = None if bias is None else bias[:channels]
        wanted = run(inputs, conv.weight[:channels], own, conv.stride, 0, conv.dilation, groups)
        part = out[:, :channels]
        if wanted.shape != part.shape:
            return False
        return float((wanted - part).double().norm()) <= close * float(wanted.double().norm())

    return agrees(1, 1) and agrees(conv.out_channels, conv.groups)
