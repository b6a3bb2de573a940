"""A model without weights, and parts of it with the weights that lie on the disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.checkpoint.pretrained import architecture, build_dense, opening, read_config
from tenfold.checkpoint.shards import WeightFiles
from tenfold.errors import CheckpointError, require
from tenfold.tracing import copied


def empty_pretrained(folder: str | Path, model_class: Any = None) -> nn.Module:
    """Return the model of transformers that a folder's config names, its parameters on the meta device.

    Buffers have values: those that are not stored, such as the frequencies of rotary positions, could not be read.

    Raises:
        CheckpointError: there is no config, or transformers does not know its class.
    """
    folder = Path(folder).expanduser()
    known = read_config(folder)
    transformers: Any = require("transformers", "hf")
    accelerate: Any = require("accelerate", "scale")
    with opening(str(folder)):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        found = model_class or architecture(known, folder)
        with accelerate.init_empty_weights(include_buffers=False):
            model: Any = build_dense(config, found)
        dtype = getattr(config, "dtype", None) or torch.float32
        for parameter in model.parameters():  # and not buffers, some of which are in float32 in any case
            parameter.data = parameter.data.to(dtype)
        model.tie_weights()
    empty: nn.Module = model.eval()
    return empty


def on_meta(model: nn.Module) -> nn.Module:
    """Return a copy without values, of which a forward says what runs and costs nothing.

    Models of transformers run with their cache there: without, their masks ask for values (whether samples are packed).
    """
    twin = copied(model).to("meta")
    known: list[Any] = [getattr(module, "config", None) for module in twin.modules()]
    for config in known:
        if hasattr(config, "use_cache"):
            config.use_cache = True
    return twin


def stored_names(model: nn.Module, files: WeightFiles, inside: Iterable[str] | None = None) -> dict[str, str]:
    """Return under which name each tensor of a model that has no values yet is stored; tied ones under one name.

    Args:
        model: on the meta device, or in part.
        files: with its weights.
        inside: prefixes of the names that are wanted; None for all.

    Raises:
        CheckpointError: a tensor is not there, or has another shape.
    """
    wanted = None if inside is None else tuple(inside)
    groups: dict[int, list[str]] = {}
    for name, tensor in _tensors(model):
        if tensor.is_meta:
            groups.setdefault(id(tensor), []).append(name)
    held: dict[str, Tensor] = dict(_tensors(model))
    found: dict[str, str] = {}
    for names in groups.values():
        if wanted is not None and not any(name.startswith(wanted) for name in names):
            continue
        there = [name for name in names if name in files.tensors]
        if not there:
            msg = (
                f"{files.folder} does not hold {names[0]!r}, which the model has: it is of another model, or was "
                f"written with other names (it has {next(iter(sorted(files.tensors)), 'nothing')!r})"
            )
            raise CheckpointError(msg)
        shape, stored = tuple(held[names[0]].shape), files.tensors[there[0]].shape
        if shape != stored:
            msg = f"{there[0]} is {stored} in {files.folder} and {shape} in the model: it is of another model"
            raise CheckpointError(msg)
        found |= dict.fromkeys(names, there[0])
    return found


def fill_(model: nn.Module, files: WeightFiles, names: dict[str, str], prefix: str = "") -> nn.Module:
    """Give the tensors of a model their stored values, in the model's own types; what is tied stays tied; return it.

    Args:
        model: a part of the whole, some of its tensors on the meta device; changed in place.
        files: with the weights of the whole.
        names: see ``stored_names``.
        prefix: of the part's names in the whole.
    """
    slots = [(name, t) for name, t in _tensors(model) if t.is_meta and f"{prefix}{name}" in names]
    read = files.read({names[f"{prefix}{name}"] for name, _ in slots})
    made: dict[int, Tensor] = {}
    for name, slot in slots:
        if id(slot) not in made:
            value = read[names[f"{prefix}{name}"]]
            value = value.to(slot.dtype) if slot.is_floating_point() else value
            made[id(slot)] = nn.Parameter(value, slot.requires_grad) if isinstance(slot, nn.Parameter) else value
        owner, _, leaf = name.rpartition(".")
        module: Any = model.get_submodule(owner)
        held = module._parameters if leaf in module._parameters else module._buffers
        held[leaf] = made[id(slot)]
    return model


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
