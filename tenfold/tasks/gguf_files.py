"""Language models in files of GGUF, as llama.cpp writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tenfold.checkpoint.model_folder import CONFIG
from tenfold.errors import CheckpointError, require


def gguf_options(source: Path) -> dict[str, Any]:
    """Return what ``from_pretrained`` of transformers is given to open a file in GGUF; nothing where there is none.

    Args:
        source: the file, or a folder with one and without a config of transformers.

    Raises:
        CheckpointError: there is no such file, or a folder has several.
        TenfoldError: the package gguf is missing.

    Example:
        >>> gguf_options(Path("bert-base-uncased"))
        {}
    """
    if source.suffix != ".gguf":
        within = source.is_dir() and not (source / CONFIG).is_file()
        files = sorted(source.glob("*.gguf")) if within else []
        if len(files) > 1:
            msg = f"{source} has {len(files)} files in GGUF: name one of them, such as {files[0]}"
            raise CheckpointError(msg)
        if not files:
            return {}
        source = files[0]
    if not source.is_file():
        msg = f"there is no file {source}"
        raise CheckpointError(msg)
    require("gguf", "gguf")
    return {"gguf_file": source.name}


def decoding() -> dict[str, Any]:
    """Return what makes transformers decode weights in GGUF to dense ones, where it would keep them in their blocks."""
    kept_in_blocks = getattr(require("transformers", "hf"), "GgufConfig", None)  # older ones always decode
    return {} if kept_in_blocks is None else {"quantization_config": kept_in_blocks(dequantize=True)}
