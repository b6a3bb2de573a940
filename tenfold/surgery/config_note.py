"""Note in the config of a model of transformers which of its layers are factorized.

``model.save_pretrained``, ``push_to_hub`` and checkpoints of a ``Trainer`` write the config beside the weights. With
the note in it their folders can be rebuilt, whoever wrote them; without it transformers would fill factorized layers
with random numbers when it loads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from pydantic import ValidationError
from torch import nn

from tenfold.errors import PlanError
from tenfold.layers import FactorizedLayer, stage_specs
from tenfold.records import Cost, LayerPlan, LayerSpec, Plan
from tenfold.records.base import explain
from tenfold.surgery.fuse_batchnorm import fused_pairs
from tenfold.surgery.narrowed_layers import narrowed_layers
from tenfold.surgery.separate import separated

NOTE = "tenfold"  # the entry of the config that holds the note
MARK = {"quant_method": "tenfold"}  # so that transformers asks tenfold before it loads the weights


def note_in_config_(model: nn.Module) -> nn.Module:
    """Bring the note in the config up to date with the layers, in place; return the model.

    Done wherever layers are put in place or taken out. A model that holds parts with configs of their own has a note in
    each; one without a config, or without factorized layers, has none. Weights that were tied to a layer that is
    factorized now are no longer tied when transformers asks.
    """
    for owner, config in _configs(model):
        note = structure_note(owner)
        if any(note.values()):
            setattr(config, NOTE, note)
            config.quantization_config = dict(MARK)
        elif hasattr(config, NOTE):
            delattr(config, NOTE)
            del config.quantization_config
    _untie_(model)
    return model


def structure_note(model: nn.Module) -> dict[str, Any]:
    """Return what has to be known to rebuild the layers of a model: plain data, for a config.

    By path the format and the ranks of each factorized layer, and its ``stages`` where these are plain layers of torch:
    what each of them is to be made with, its defaults left out. By path too what has changed of ``narrowed`` layers.
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, FactorizedLayer)}
    return {
        "layers": {path: _layer_note(layer) for path, layer in layers.items()},
        "narrowed": narrowed_layers(model),
        "fused": fused_pairs(model),
        "unrolled": separated(model),
    }


def plan_in_note(note: Mapping[str, Any], model: nn.Module) -> Plan:
    """Return a plan with the structure in a note, for ``restructure_``: no costs or reasons, and no narrowed layers.

    Args:
        note: the entry ``tenfold`` of a config.
        model: that it is about.

    Raises:
        PlanError: the note is none that this version wrote.
    """
    try:
        layers = tuple(
            LayerPlan(
                path=path,
                kind=entry["kind"],
                action="keep",
                format=entry["format"],
                rank=entry["rank"],
                reason="as it was saved",
                before=Cost(),
                after=Cost(),
            )
            for path, entry in note["layers"].items()
        )
        return Plan(
            tenfold="",  # the note does not say which wrote it
            model=type(model).__name__,
            before=Cost(),
            after=Cost(),
            layers=layers,
            fused=note["fused"],
            unrolled=note["unrolled"],
        )
    except (AttributeError, KeyError, TypeError) as error:
        msg = f"the entry {NOTE!r} of the config cannot be read: {error!r} is missing or of another type"
        raise PlanError(msg) from error
    except ValidationError as error:
        msg = f"the entry {NOTE!r} of the config cannot be read: {explain(error)}"
        raise PlanError(msg) from error


def _configs(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """Yield each config of transformers in a model with the outermost module that has it."""
    seen: set[int] = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "to_json_string") and hasattr(module, "save_pretrained") and id(config) not in seen:
            seen.add(id(config))
            yield module, config


def _layer_note(layer: FactorizedLayer) -> dict[str, Any]:
    note: dict[str, Any] = {"kind": str(layer.spec), "format": layer.format, "rank": dict(layer.rank)}
    plain = [stage for stage in stage_specs(layer) if isinstance(stage, LayerSpec)]
    if len(plain) == len(layer.stages):
        note["stages"] = [_options(stage) for stage in plain]
    return note


def _options(spec: LayerSpec) -> dict[str, Any]:
    """Return what a plain layer is made with, as JSON has it: kind, sizes, and whatever is no default."""
    usual = asdict(LayerSpec(kind="linear", in_channels=1, out_channels=1))
    always = ("kind", "in_channels", "out_channels")
    own = {name: value for name, value in asdict(spec).items() if name in always or value != usual[name]}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}


def _untie_(model: nn.Module) -> None:
    """Take the weights of factorized layers out of what transformers ties; it ties again once weights are loaded."""
    for module in model.modules():
        tied = getattr(module, "all_tied_weights_keys", None)
        if not isinstance(tied, dict) or not tied:
            continue
        gone = {f"{path}.weight" for path, m in module.named_modules() if isinstance(m, FactorizedLayer)}
        if gone & {*tied, *tied.values()}:
            kept = {target: source for target, source in tied.items() if not gone & {target, source}}
            # The first is what ``from_pretrained`` reads, the second what ``tie_weights()`` makes the first from.
            vars(module).update(all_tied_weights_keys=kept, _tied_weights_keys=kept)
