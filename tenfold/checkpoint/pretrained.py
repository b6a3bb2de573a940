"""Save and load compressed models of transformers, with config and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from tenfold.checkpoint.hub_facts import HubFacts, hub_facts, source_folder
from tenfold.checkpoint.model_folder import CONFIG, WEIGHTS, load, save
from tenfold.checkpoint.remote_code import forget_code_, write_modeling_file
from tenfold.checkpoint.sentence_files import keep_sentence_files
from tenfold.checkpoint.stock_config import stock_config
from tenfold.checkpoint.weights_file import is_checkpoint
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
from tenfold.surgery import MARK, NOTE, note_in_config_

OWN_CODE = {"trust_remote_code": False}  # for every call of transformers: refused, and nobody is asked


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
    ``tenfold.save`` writes. Open it with ``load_pretrained``, or with ``tenfold.load`` and a skeleton. Where plain
    layers of torch are all that the plan needs, ``modeling_tenfold.py`` is there as well, so that
    ``AutoModel.from_pretrained(path, trust_remote_code=True)`` opens the folder without tenfold.

    ``model.save_pretrained(path)``, transformers' own, writes weights and config alone: that folder is opened by
    ``load_pretrained``, and by ``AutoModel.from_pretrained`` once ``tenfold.integrations.hf`` is imported.

    Args:
        model: a ``PreTrainedModel`` in which the plan was carried out, or a module around one, such as a pooling, of
            whose own layers none is factorized: then the folder is that of the inner model.
        plan: carried out on it.
        path: the folder.
        tokenizer: or any processor; None for none.
        record: of the run.

    Raises:
        CheckpointError: the model is not one of transformers, model and plan disagree, or the folder is not writable or
            holds other files.
    """
    model, plan = _inner(model, plan)
    return save(model, plan, path, record=record, beside=partial(write_config, model, tokenizer=tokenizer))


def _inner(model: nn.Module, plan: Plan) -> tuple[nn.Module, Plan]:
    """Return the outermost model of transformers in a module, and the plan of its layers."""
    found = [(path, m) for path, m in model.named_modules() if hasattr(getattr(m, "config", None), "to_json_string")]
    if not found:
        msg = f"{type(model).__name__} is not a model of transformers, which have a config: use tenfold.save"
        raise CheckpointError(msg)
    path, inner = found[0]
    if not path:
        return model, plan
    outside = [layer.path for layer in plan.layers if layer.format and not layer.path.startswith(f"{path}.")]
    if outside:
        msg = f"{outside[0]!r} is factorized and lies outside of {path!r}, the model of transformers: use tenfold.save"
        raise CheckpointError(msg)
    return inner, plan.below(path).replace(model=type(inner).__name__)


def write_config(model: Any, folder: Path, *, tokenizer: Any = None) -> HubFacts:
    """Write what opens a model of transformers into a folder, and return what its card says.

    That is the config, the files of the tokenizer, and those of a SentenceTransformer where the model came from one. A
    model that is narrower alike in all layers gets a config by which transformers builds it; all others one with a note
    for tenfold, and the modelling file.
    """
    note_in_config_(model)
    config = json.loads(model.config.to_json_string(use_diff=True)) | {"architectures": [type(model).__name__]}
    for part in config.values():  # parts with configs of their own: the note of the whole has all layers
        if isinstance(part, dict) and NOTE in part:
            del part[NOTE], part["quantization_config"]
    note = config.get(NOTE)
    stock = stock_config(model, note)
    if stock is not None:
        config = {name: value for name, value in config.items() if name not in (NOTE, "quantization_config")} | stock
    else:
        auto_map = write_modeling_file(model, note, folder)
        config |= {"quantization_config": MARK} | ({"auto_map": auto_map} if auto_map else {})
    write_text(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    source = source_folder(model)
    sentences = keep_sentence_files(source, folder)
    return hub_facts(model, source, sentences=sentences, stock=stock is not None)


def load_pretrained(path: str | Path, model_class: Any = None) -> nn.Module:
    """Load a model, in eval mode, from a folder of ``save_pretrained`` or ``tenfold compress --task hf:...``.

    The class is named by the config; its code comes from transformers, never from the folder. Folders that
    ``model.save_pretrained`` wrote, in one file or several, are opened as well.

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
    path = Path(path)
    if _opened_by_transformers(path):
        return _from_transformers(path, model_class)
    return load(skeleton(path, model_class), path)[0].eval()


def _opened_by_transformers(path: Path) -> bool:
    """Whether the config alone says how the layers are rebuilt, by a note or because it is that of a stock model."""
    if not (path / CONFIG).is_file():
        return False
    config, single = read_config(path), path / WEIGHTS
    ours = single.is_file() and is_checkpoint(single)
    if NOTE in config:
        return not ours and (single.is_file() or (path / f"{WEIGHTS}.index.json").is_file())
    return ours and "quantization_config" not in config


def _from_transformers(path: Path, model_class: Any) -> nn.Module:
    """Return the model that transformers loads once it asks tenfold for the layers."""
    import tenfold.checkpoint.quantizer  # noqa: F401 - registers it

    with opening(str(path)):
        model: nn.Module = (model_class or architecture(read_config(path), path)).from_pretrained(path, **OWN_CODE)
    return model.eval()


def skeleton(path: str | Path, model_class: Any = None) -> nn.Module:
    """Return a dense model with fresh weights, as the config in a folder says; see ``load_pretrained``."""
    path = Path(path)
    if not (path / CONFIG).is_file():
        msg = f"{path} has no {CONFIG}: was it written by save_pretrained?"
        if (path / WEIGHTS).is_file() and is_checkpoint(path / WEIGHTS):
            msg = (
                f"{path} has no {CONFIG}: it was written by save. Open it with tenfold.load(skeleton, {str(path)!r}), "
                "the skeleton being the dense model, or write it with save_pretrained"
            )
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
    forget_code_(config)
    for name in ("quantization_config", NOTE):
        if hasattr(config, name):
            delattr(config, name)
    make = getattr(model_class, "_from_config", None) or getattr(model_class, "from_config", model_class)
    model: nn.Module = make(config)
    return model.eval()
