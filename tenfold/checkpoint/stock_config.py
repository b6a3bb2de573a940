"""Find the config with which transformers itself builds a narrowed model: where sizes are equal over all layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from itertools import islice, product
from typing import Any

import torch
from torch import nn

from tenfold.surgery import NOTE

_MOST_TRIED = 64


def stock_config(model: Any, note: Mapping[str, Any] | None) -> dict[str, int] | None:
    """Return what to change in the config of a narrowed model, so that the stock class is the very same network.

    No table of names is asked: the numbers in the config in proportion to a size that has changed are tried in turn,
    and a stock model of the changed config has to have the same classes, parameters, buffers and attributes (the
    scale of attention scores is one). Then the folder needs no tenfold and no modelling file: any engine opens it.

    Args:
        model: of transformers.
        note: in its config.

    Returns:
        New values by name; None if no config of the class describes the model.
    """
    if note is None or note["layers"] or note["fused"] or note["unrolled"]:
        return None
    with torch.device("meta"):
        dense = type(model)(_plain(model.config, {}))
    for changes in islice(_candidates(model.config, _ratios(dense, note)), _MOST_TRIED):
        try:
            with torch.device("meta"):
                stock = type(model)(_plain(model.config, changes))
        except (ValueError, TypeError, RuntimeError, ZeroDivisionError):  # numbers that do not go together
            continue
        if _structure(stock, changes) == _structure(model, changes):
            return changes
    return None


def _ratios(dense: nn.Module, note: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return the sizes that have changed, as (before, after), each once."""
    modules = dict(dense.named_modules())
    found: dict[tuple[int, int], None] = {}
    for path, change in note["narrowed"].items():
        for name, after in change["attributes"].items():
            before = getattr(modules[path], name, None)
            if isinstance(before, int) and isinstance(after, int) and before != after:
                found[before, after] = None
    return list(found)


def _candidates(config: Any, ratios: list[tuple[int, int]]) -> Iterator[dict[str, int]]:
    """Iterate over changes of the config: for each size a number in it that may stand for it, equal ones first."""
    numbers = {name: value for name, value in vars(config).items() if type(value) is int and not name.startswith("_")}
    ways = []
    for before, after in ratios:
        fitting = [name for name, value in numbers.items() if value > 0 and value * after % before == 0]
        fitting.sort(key=lambda name: numbers[name] != before)
        ways.append([(name, numbers[name] * after // before) for name in fitting])
    for chosen in product(*ways):
        if len(dict(chosen)) == len(set(chosen)):  # no name with two values
            yield dict(chosen)


def _plain(config: Any, changes: Mapping[str, int]) -> Any:
    """Return a copy of a config with changes, and without the note."""
    own = copy.deepcopy(config)
    for name in (NOTE, "quantization_config"):
        if hasattr(own, name):
            delattr(own, name)
    for name, value in changes.items():
        setattr(own, name, value)
    return own


def _structure(model: nn.Module, changes: Mapping[str, int]) -> dict[str, Any]:
    """Return all that tells networks apart but the values of their tensors, and copies of what the config says."""
    shapes = {name: tuple(t.shape) for held in (model.named_parameters(), model.named_buffers()) for name, t in held}
    facts: dict[str, Any] = {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, int | float | str) and name != "training" and not name.startswith("_")
        if name not in changes
    }
    classes = {f"{path}.class": type(module) for path, module in model.named_modules()}
    return shapes | facts | classes
