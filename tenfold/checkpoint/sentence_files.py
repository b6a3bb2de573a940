"""The files by which a folder is a SentenceTransformer: kept, a compressed one still opens as such."""

from __future__ import annotations

import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from tenfold.errors import FileError
from tenfold.files import read_text
from tenfold.records.parsing import parse_json

MODULES = "modules.json"
_BESIDE = ("sentence_bert_config.json", "config_sentence_transformers.json")


def keep_sentence_files(source: Path | None, folder: Path) -> bool:
    """Copy what makes a SentenceTransformer of a folder with a transformer, and return whether there was any.

    These are ``modules.json``, which names the modules in their order, two files of settings, and a folder for each
    further module (pooling, normalisation, a dense layer). The transformer itself has to be at the top of the folder.

    Args:
        source: the folder of the model that was compressed; None for none.
        folder: that of the compressed model.
    """
    modules = _modules(source)
    if source is None or not modules or modules[0] != ".":
        return False
    for name in (MODULES, *_BESIDE):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    for path in modules[1:]:
        (folder / path).mkdir(parents=True, exist_ok=True)  # a module without settings is an empty folder
        for file in sorted((source / path).glob("*")):
            if file.is_file():
                shutil.copyfile(file, folder / path / file.name)
    return True


def _modules(source: Path | None) -> list[str]:
    """Return the folders of the modules in their order, "." for the top; empty where they are not all inside."""
    if source is None or not (source / MODULES).is_file():
        return []
    try:
        found: Any = parse_json(read_text(source / MODULES, "the modules"))
        paths = [PurePosixPath(str(module["path"])) for module in found]
    except (FileError, ValueError, KeyError, TypeError):
        return []
    inside = all(not path.is_absolute() and ".." not in path.parts for path in paths)
    return [str(path) for path in paths] if inside else []
