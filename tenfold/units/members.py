"""Which layers may be members of a unit, and where they sit."""

from __future__ import annotations

from collections.abc import Sequence

from tenfold.records import LayerProfile


def narrowable(layer: LayerProfile) -> bool:
    """Whether a layer may lose channels: a dense one without groups, run by the forward, whose weight is its own."""
    own = not (layer.tied or layer.read or layer.format or layer.aliases)
    return own and layer.reached and layer.spec is not None and layer.spec.groups == 1


def inputs(layer: LayerProfile) -> int:
    """Return the number of input channels of a layer, or 0."""
    return 0 if layer.spec is None else layer.spec.in_channels


def outputs(layer: LayerProfile) -> int:
    """Return how many output channels a layer has; 0 where it has no geometry."""
    return 0 if layer.spec is None else layer.spec.out_channels


def parent(path: str) -> str:
    """Return the path of the module that holds a layer; empty for the model.

    Example:
        >>> parent("blocks.0.fc1"), parent("fc1")
        ('blocks.0', '')
    """
    return path.rpartition(".")[0]


def holder(paths: Sequence[str]) -> str:
    """Return the path of the smallest module that holds all of some layers.

    Example:
        >>> holder(["layer.0.intermediate.dense", "layer.0.output.dense"])
        'layer.0'
    """
    shared: list[str] = []
    for names in zip(*(parent(path).split(".") for path in paths), strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)
