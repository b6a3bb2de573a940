"""Hugging Face: save and load compressed models, ``AutoModel.from_pretrained``, and the Hub.

Importing this module teaches transformers to open compressed folders: ``AutoModel...from_pretrained(folder)`` then
gives the layers the structure of the plan before it loads the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tenfold.checkpoint import load_pretrained, read_weights, save_pretrained
from tenfold.checkpoint.model_folder import WEIGHTS
from tenfold.checkpoint.quantizer import TenfoldConfig, TenfoldQuantizer
from tenfold.checkpoint.remote_code import FILE
from tenfold.errors import require

__all__ = ["TenfoldConfig", "TenfoldQuantizer", "load_pretrained", "pull", "push", "save_pretrained"]


def push(
    path: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Add a model compressed with tenfold",
    api: Any = None,
) -> str:
    """Upload a compressed folder to the Hub, and return the URL of the commit.

    Args:
        path: a folder written by ``save_pretrained``, which is checked first.
        repo_id: ``"owner/name"``; created if it does not exist.
        private: whether a new repository is private.
        revision: branch.
        message: of the commit.
        api: an ``HfApi``; one with the stored login if None.

    Raises:
        CheckpointError: the folder is not a complete compressed model.
    """
    path = Path(path)
    read_weights(path / WEIGHTS)
    if api is None:
        hub: Any = require("huggingface_hub", "hf")
        api = hub.HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    done = api.upload_folder(repo_id=repo_id, folder_path=str(path), revision=revision, commit_message=message)
    return str(getattr(done, "commit_url", done))


def pull(repo_id: str, path: str | Path | None = None, *, revision: str | None = None, api: Any = None) -> Path:
    """Download a compressed model from the Hub, or take it from the cache, and return its folder.

    Args:
        repo_id: ``"owner/name"``.
        path: target folder; the cache of the Hub if None.
        revision: branch, tag or commit.
        api: an ``HfApi``; one with the stored login if None.

    Raises:
        CheckpointError: the repository holds no model written by tenfold.
    """
    if api is None:
        hub: Any = require("huggingface_hub", "hf")
        api = hub.HfApi()
    wanted = ["*.safetensors", "*.json", "*.yaml", "*.txt", "*.model", "*.jinja", "README.md", FILE]
    found = api.snapshot_download(repo_id, revision=revision, local_dir=path, allow_patterns=wanted)
    read_weights(Path(found) / WEIGHTS)
    return Path(found)
