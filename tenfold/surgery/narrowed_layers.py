"""What has changed of the layers that units were narrowed to, as plain data: to make them again without the unit."""

from __future__ import annotations

from typing import Any

from torch import nn

MARK = "narrowed"  # the attribute of a module that holds it


def mark_narrowed(old: nn.Module, new: nn.Module) -> None:
    """Note on a layer in what it differs from the one that it takes the place of, and from that one's predecessors.

    That are the shapes of parameters and buffers, public attributes such as ``in_features``, and the class, if it is
    another one.
    """
    before: dict[str, Any] = getattr(old, MARK, {"shapes": {}, "attributes": {}})
    another = type(new) is not type(old)
    shapes = {name: tuple(tensor.shape) for name, tensor in _tensors(old).items()}
    changed = {name: list(t.shape) for name, t in _tensors(new).items() if another or shapes[name] != tuple(t.shape)}
    values = {
        name: value
        for name, value in vars(new).items()
        if not name.startswith("_") and name != "training" and isinstance(value, int | float | str)
        if another or vars(old).get(name) != value
    }
    mark = {"shapes": before["shapes"] | changed, "attributes": before["attributes"] | values}
    named = type(new).__name__ if another else before.get("class")
    setattr(new, MARK, mark | ({"class": named} if named else {}))


def mark_attributes(module: nn.Module, values: dict[str, Any]) -> None:
    """Note on a module that stays which of its attributes were changed."""
    before: dict[str, Any] = getattr(module, MARK, {"shapes": {}, "attributes": {}})
    setattr(module, MARK, before | {"attributes": before["attributes"] | values})


def narrowed_layers(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return by path what was noted on the modules of a model."""
    return {path: dict(vars(module)[MARK]) for path, module in model.named_modules() if MARK in vars(module)}


def _tensors(module: nn.Module) -> dict[str, Any]:
    held = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in held.items() if tensor is not None}
