"""Save and load compressed models of transformers, with config and tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from tenfold.checkpoint.model_folder import load, save
from tenfold.diagnosis import trouble
from tenfold.errors import (
    CheckpointError,
    FileError,
    InstallationError,
    TenfoldError,
    first_line,
    naming_trouble,
    require,
)
from tenfold.files import read_text, write_text
from tenfold.records import Plan, RunRecord
from tenfold.records.parsing import parse_json

CONFIG = "config.json"
OWN_CODE = {"trust_remote_code": False}  # for every call of transformers: refused, and nobody is asked
MARK = {"quant_method": "tenfold"}  # so that transformers does not load the weights into dense layers


def save_pretrained(
    model: nn.Module,
    plan: Plan,
    path: str | Path,
    *,
    tokenizer: Any = None,
    record: RunRecord | None = None,
) -> Path:
    """Write a compressed model of transformers to a folder and return that: a checkpoint with its own skeleton.

    It adds ``config.json``, ``generation_config.json`` for generative models, and the files of the tokenizer to what
    ``tenfold.save`` writes. Open it with ``load_pretrained``, or with ``tenfold.load`` and a skeleton.

    Args:
        model: a ``PreTrainedModel`` in which the plan was carried out.
        plan: carried out on it.
        path: the folder.
        tokenizer: or any processor; None for none.
        record: of the run.

    Raises:
        CheckpointError: the model is not one of transformers, model and plan disagree, or the folder is not writable or
            holds other files.
    """
    if not hasattr(model, "config") or not hasattr(model.config, "to_json_string"):
        msg = f"{type(model).__name__} is not a model of transformers, which have a config: use tenfold.save"
        raise CheckpointError(msg)
    return save(model, plan, path, record=record, beside=partial(write_config, model, tokenizer=tokenizer))


def write_config(model: Any, folder: Path, *, tokenizer: Any = None) -> None:
    """Write the config of a model of transformers into a folder, marked as compressed, and the tokenizer's files."""
    config = json.loads(model.config.to_json_string(use_diff=True))
    config |= {"architectures": [type(model).__name__], "quantization_config": MARK}
    write_text(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        for inner in [p for p in folder.iterdir() if p.is_dir()]:  # further chat templates: files alone can be swapped
            shutil.rmtree(inner)


def load_pretrained(path: str | Path, model_class: Any = None) -> nn.Module:
    """Load a model, in eval mode, from a folder of ``save_pretrained`` or ``tenfold compress --task hf:...``.

    The class is named by the config; its code comes from transformers, never from the folder.

    Args:
        path: the folder.
        model_class: a class of your own that takes the config, if transformers does not have the class.

    Raises:
        CheckpointError: there is no config, its class is unknown, or the weights are damaged or for another model.

    Example:
        >>> load_pretrained("nowhere")
        Traceback (most recent call last):
        ...
        tenfold.errors.CheckpointError: nowhere has no config.json: was it written by save_pretrained?
    """
    return load(skeleton(path, model_class), path)[0].eval()


def skeleton(path: str | Path, model_class: Any = None) -> nn.Module:
    """Return a dense model with fresh weights, as the config in a folder says; see ``load_pretrained``."""
    path = Path(path)
    if not (path / CONFIG).is_file():
        msg = f"{path} has no {CONFIG}: was it written by save_pretrained?"
        raise CheckpointError(msg)
    transformers: Any = require("transformers", "hf")
    known = read_config(path)
    with opening(str(path)):
        config = transformers.AutoConfig.from_pretrained(path, **OWN_CODE)
    return build_dense(config, model_class or architecture(known, path))


def read_config(path: Path) -> dict[str, Any]:
    """Return the entries of the ``config.json`` in a folder.

    Raises:
        CheckpointError: there are none to read.
    """
    try:
        found = parse_json(read_text(path / CONFIG, "a config"))
    except (ValueError, FileError) as error:
        msg = f"{path / CONFIG} cannot be read: {first_line(error)}"
        raise CheckpointError(msg) from error
    if not isinstance(found, dict):
        msg = f"{path / CONFIG} cannot be read: it is no config"
        raise CheckpointError(msg)
    return found


@contextmanager
def opening(name: str) -> Iterator[None]:
    """Raise in one line what transformers finds wrong with a folder or id, or that it would run code from there."""
    try:
        yield
    except TenfoldError:
        raise
    except Exception as error:  # a damaged folder ends in nearly any error of transformers
        if (wrong := trouble(error)) is not None:
            raise InstallationError(wrong) from error
        msg = f"{name} cannot be opened: {first_line(error)}"
        if "trust_remote_code" in str(error) or "custom code" in str(error):
            msg = (
                f"{name} brings Python code of its own, and tenfold never runs that: build the model yourself, and "
                "give it to tenfold.compress"
            )
        raise CheckpointError(msg) from error


def architecture(config: Mapping[str, Any], where: object) -> Any:
    """Return the class that a config of transformers names first.

    Raises:
        CheckpointError: it names none, or one that transformers does not have.
    """
    transformers: Any = require("transformers", "hf")
    named = config.get("architectures")
    name = str(named[0]) if isinstance(named, list | tuple) and named else None
    with naming_trouble():
        found = getattr(transformers, name, None) if name else None
    if found is None:
        what = f"the class {name}, which transformers does not have" if name else "no class"
        msg = f"the config of {where} names {what}: pass model_class"
        raise CheckpointError(msg)
    return found


def build_dense(config: Any, model_class: Any) -> nn.Module:
    """Return a dense model with fresh weights, whether or not the config is that of a compressed one."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    make = getattr(model_class, "_from_config", None) or getattr(model_class, "from_config", model_class)
    model: nn.Module = make(config)
    return model.eval()
