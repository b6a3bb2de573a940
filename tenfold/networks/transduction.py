"""From pictures to video: factorized convolutions get one more factor, along time, and begin as frame by frame."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tenfold.errors import PlanError, WeightError
from tenfold.formats import FORMATS
from tenfold.layers import FactorizedLayer
from tenfold.records import LayerSpec

# Formats of convolutions whose inner channels are the terms of a CP: a further factor multiplies these.
_TERMS = ("cp3", "cp4", "low_rank")


class VideoNet(nn.Module):
    """A network of pictures that looks at clips: what it makes of each frame, with factors along time between.

    Transduction of Kossaifi et al. 2020 (arXiv 1906.06196): the convolution W = Σ u_o ∘ u_i ∘ u_1 ∘ … ∘ u_N of a
    trained network gets one more factor u_t, which begins as 1 at the centre and 0 elsewhere. At first it is exactly
    the network of pictures on each frame; training the factors along time alone, then all, lets frames know of each
    other. Use it where there are few clips and a network that knows the pictures.

    Frames are folded into the batch, so batch norms take statistics over all of them.

    Args:
        network: its convolutions in the formats cp3, cp4 or low_rank get a factor along time; it stays as it is.
        taps: frames that a factor sees, the one at the centre included; of an even number one more lies ahead.
        average: whether outputs are averaged over the frames; else they are (batch, frames, ...).

    Shape:
        Clips are (batch, channels, frames, *size).

    Raises:
        PlanError: no convolution of the network has such a format.

    Example:
        >>> import tenfold
        >>> net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1))
        >>> recipe = {"rule": {"name": "fixed", "ranks": {"2": 12}}, "formats": "cp3"}
        >>> small = tenfold.compress(net, torch.zeros(1, 3, 8, 8), recipe, runtime=tenfold.Runtime(measure=False)).model
        >>> clips = torch.randn(2, 3, 5, 8, 8)
        >>> watching = VideoNet(small.eval(), average=False).eval()
        >>> torch.equal(watching(clips)[:, 3], small(clips[:, :, 3]))
        True
        >>> sum(p.numel() for p in watching.temporal())  # 12 terms, 3 taps
        36
    """

    def __init__(self, network: nn.Module, taps: int = 3, *, average: bool = True) -> None:
        super().__init__()
        self.average = average
        holder = nn.Module()
        holder.add_module("network", copy.deepcopy(network))
        made: dict[FactorizedLayer, WithTime] = {}
        for path, child in list(holder.named_modules(remove_duplicate=False)):  # under all its names
            if isinstance(child, FactorizedLayer) and child.spec.axes and child.format in _TERMS:
                made.setdefault(child, WithTime(child, taps))
                holder.set_submodule(path, made[child])
        if not made:
            msg = (
                f"no convolution is factorized as {', '.join(_TERMS)}, and so none can have a factor along time: "
                "compress the network with formats=cp3 first"
            )
            raise PlanError(msg)
        self.network: nn.Module = holder.get_submodule("network")

    def forward(self, clips: Tensor) -> Tensor:
        """Return the outputs (batch, ...), or (batch, frames, ...), for clips (batch, channels, frames, *size)."""
        frames = clips.shape[2]
        for module in self.network.modules():
            if isinstance(module, TemporalFactor):
                module.frames = frames
        outputs: Tensor = self.network(clips.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, frames))
        return outputs.mean(1) if self.average else outputs

    def temporal(self) -> Iterator[nn.Parameter]:
        """Iterate over the factors along time."""
        return (module.weight for module in self.network.modules() if isinstance(module, TemporalFactor))

    def train_temporal_only_(self, only: bool = True) -> VideoNet:  # noqa: FBT001, FBT002 - as requires_grad_ of torch
        """Let gradients reach the factors along time alone, or everything again; return the network."""
        self.network.requires_grad_(not only)
        for factor in self.temporal():
            factor.requires_grad_()
        return self


class WithTime(nn.Module):
    """A factorized convolution whose terms have a factor along time besides.

    Use it by ``VideoNet``, which says how many frames there are.
    """

    def __init__(self, layer: FactorizedLayer, taps: int) -> None:
        super().__init__()
        self.layer = layer
        last = layer.stages[-1]
        self.temporal = TemporalFactor(int(last.in_channels), taps, like=last.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layer makes of frames (batch·frames, channels, *size)."""
        *stages, last = self.layer.stages
        for stage in stages:
            x = stage(x)
        out: Tensor = last(self.temporal(x))
        return out


class TemporalFactor(nn.Module):
    """A depthwise convolution over the frames that lie one after the other in a batch, the identity at first.

    Use it in a network of your own where ``VideoNet`` does not reach. Beyond the first and the last frame are zeros.

    Args:
        channels: of the input.
        taps: frames that it sees.
        like: a tensor in whose dtype and on whose device the weight is made.

    Attributes:
        weight: (channels, taps).
        frames: of each clip in the batch; set it before the forward.
    """

    def __init__(self, channels: int, taps: int, like: Tensor | None = None) -> None:
        super().__init__()
        _check(taps)
        weight = torch.zeros(channels, taps) if like is None else like.detach().new_zeros(channels, taps)
        weight[:, _centre(taps)] = 1
        self.weight = nn.Parameter(weight)
        self.frames = 1

    def forward(self, x: Tensor) -> Tensor:
        """Return the frames (batch·frames, channels, *size), each with what those around it add."""
        if len(x) % self.frames:
            msg = f"{len(x)} frames in the batch are no clips of {self.frames}: set `frames`, or call a VideoNet"
            raise WeightError(msg)
        clips = x.unflatten(0, (-1, self.frames))
        taps = self.weight.unflatten(0, (-1, *(1 for _ in x.shape[2:]))).movedim(-1, 0)  # (taps, channels, 1, ...)
        centre = _centre(len(taps))
        seen = clips * taps[centre]
        for tap, weight in enumerate(taps):
            ahead = tap - centre
            overlap = self.frames - abs(ahead)
            if ahead and overlap > 0:
                part = clips.narrow(1, max(ahead, 0), overlap) * weight
                seen.narrow(1, max(-ahead, 0), overlap).add_(part)
        together: Tensor = seen.flatten(0, 1)
        return together

    def extra_repr(self) -> str:
        """Return the sizes, as torch's own layers do."""
        return f"{len(self.weight)}, taps={self.weight.shape[1]}"


def inflated(layer: FactorizedLayer, taps: int = 3) -> FactorizedLayer:
    """Return a convolution with one more axis, before its others, that begins as the layer itself on each slice.

    Use it to put a layer into a network of clips written by hand: a convolution of pictures in the format cp4 becomes
    one of clips, one of series in cp3 becomes one of pictures. All factors are copied; the new one is 1 at the centre.

    Args:
        layer: a convolution in the format cp4, or in cp3 with one axis.
        taps: extent of the kernel along the new axis, odd and 3 or more.

    Raises:
        PlanError: a layer in another format, one that pads other than by zeros, or taps without a centre.

    Example:
        >>> from tenfold.decompositions import decompose
        >>> layer = FactorizedLayer.of(decompose(torch.randn(8, 6, 3, 3), "cp4", {"rank": 5}).value)
        >>> wider = inflated(layer)
        >>> wider.spec.kernel, tuple(wider(torch.zeros(1, 6, 4, 7, 7)).shape)
        ((3, 3, 3), (1, 8, 4, 5, 5))
    """
    spec, wanted = layer.spec, "cp4" if layer.spec.axes == 2 else "cp3"
    if spec.kind != "conv" or spec.axes > 2 or layer.format != wanted:
        msg = (
            f"a {spec.kind} layer with {spec.axes} axes in the format {layer.format} cannot have one axis more: "
            "convolutions of pictures in cp4 can, and of series in cp3; a whole network can by VideoNet"
        )
        raise PlanError(msg)
    if spec.padding_mode != "zeros":
        msg = f"it pads by {spec.padding_mode}, and would along the new axis too: only zeros keep slices apart"
        raise PlanError(msg)
    _check(taps)
    if taps % 2 == 0 or taps < 3:
        msg = f"taps={taps} is no odd number of 3 or more, and the new axis is padded alike on both sides"
        raise PlanError(msg)
    value = layer.factorization()
    outer, inner, *along = value.factors()  # type: ignore[attr-defined]
    new = along[0].new_zeros(len(along[0]), taps, along[0].shape[-1])
    new[:, _centre(taps)] = 1
    clip = _with_axis(spec, taps)
    found = FactorizedLayer.of(FORMATS.get("cp4").of(clip, (outer, inner, new, *along)), layer.bias)  # type: ignore[attr-defined]
    return found.train(layer.training)


def _with_axis(spec: LayerSpec, taps: int) -> LayerSpec:
    padding = spec.padding if isinstance(spec.padding, str) else (taps // 2, *spec.padding)
    if padding == "valid":
        padding = (taps // 2, *(0 for _ in spec.kernel))
    return spec.replace(
        kernel=(taps, *spec.kernel),
        stride=(1, *spec.stride),
        padding=padding,
        output_padding=(0, *spec.output_padding),
        dilation=(1, *spec.dilation),
    )


def _centre(taps: int) -> int:
    return (taps - 1) // 2


def _check(taps: int) -> None:
    if taps < 1:
        msg = f"taps={taps}: a factor along time sees one frame or more"
        raise PlanError(msg)
