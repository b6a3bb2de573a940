"""Write the modelling file with which a folder opens without tenfold, and say in its config which class is where."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tenfold.checkpoint import modeling_template
from tenfold.errors import require
from tenfold.files import read_text, write_text

FILE = "modeling_tenfold.py"


def write_modeling_file(model: Any, note: Mapping[str, Any] | None, folder: Path) -> dict[str, str]:
    """Write ``modeling_tenfold.py``, which imports torch and transformers alone, and return the ``auto_map`` for it.

    Nothing is written, and nothing returned, where no such file can rebuild the model: see ``reason_for_none``.

    Args:
        model: of transformers.
        note: in its config; None for none.
        folder: with its ``config.json``.
    """
    if note is None or reason_for_none(model, note):
        return {}
    classes = auto_classes(model.config)
    text = read_text(Path(modeling_template.__file__), "the template").rstrip()
    names = sorted({cls.__name__ for cls in classes.values()})
    text = text.replace(
        "from torch import nn\n", f"from torch import nn\nfrom transformers import {', '.join(names)}\n", 1
    )
    for name in names:
        text += f'\n\n\nclass Tenfold{name}(Compressed, {name}):\n    """{name} with the layers of this folder."""'
    write_text(folder / FILE, text + "\n")
    return {auto: f"{FILE.removesuffix('.py')}.Tenfold{cls.__name__}" for auto, cls in classes.items()}


def reason_for_none(model: Any, note: Mapping[str, Any]) -> str:
    """Return why no modelling file without tenfold can rebuild a model, or an empty text, in words for its card."""
    if note["fused"] or note["unrolled"]:
        return "batch norms are fused, or modules are taken apart into layers"
    others = sorted({entry["format"] for entry in note["layers"].values() if "stages" not in entry})
    if others:
        return f"layers of the format {', '.join(others)} run in other layers than torch has"
    classes = {change.get("class") for change in note["narrowed"].values()} - {None}
    if unknown := sorted(name for name in classes if not hasattr(modeling_template, name)):
        return f"narrow layers are of the class {', '.join(unknown)}"
    if type(model) not in auto_classes(model.config).values():
        return f"transformers has no Auto class for {type(model).__name__}"
    return ""


def auto_classes(config: Any) -> dict[str, type]:
    """Return by the name of its Auto class each class of transformers that takes a config of this type."""
    transformers: Any = require("transformers", "hf")
    classes: dict[str, type] = {}
    for name in dir(transformers):
        mapping = getattr(getattr(transformers, name), "_model_mapping", None) if name.startswith("AutoModel") else None
        if mapping is None or type(config) not in mapping:
            continue
        found = mapping[type(config)]
        classes[name] = found[0] if isinstance(found, tuple) else found
    return classes


def forget_code_(config: Any) -> None:
    """Take the modelling file out of a config, in place: whoever writes the config elsewhere does not copy the file."""
    named = getattr(config, "auto_map", None) or {}
    if any(FILE.removesuffix(".py") in str(name) for name in named.values()):
        del config.auto_map
