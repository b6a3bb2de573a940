"""Hugging Face: save and load compressed models, ``AutoModel.from_pretrained``, and the Hub.

Importing this module teaches transformers to open compressed folders: ``AutoModel...from_pretrained(folder)`` then
gives the layers the structure of the plan before it loads the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from tenfold.checkpoint import load_pretrained, read_weights, save_pretrained
from tenfold.checkpoint.model_folder import WEIGHTS
from tenfold.checkpoint.pretrained import MARK
from tenfold.errors import CheckpointError, TenfoldError, require
from tenfold.surgery import restructure_

__all__ = ["TenfoldConfig", "TenfoldQuantizer", "load_pretrained", "pull", "push", "save_pretrained"]

_base: Any = require("transformers.quantizers.base", "hf")
_auto: Any = require("transformers.quantizers.auto", "hf")
_config: Any = require("transformers.utils.quantization_config", "hf")
METHOD = MARK["quant_method"]


class TenfoldConfig(_config.QuantizationConfigMixin):  # type: ignore[misc]
    """Mark of a compressed model in ``config.json``. The plan is in the header of the weights."""

    def __init__(self, **unknown: Any) -> None:
        del unknown
        self.quant_method = METHOD

    def to_dict(self) -> dict[str, Any]:
        """Return the entries of ``config.json``."""
        return dict(MARK)


class TenfoldQuantizer(_base.HfQuantizer):  # type: ignore[misc]
    """Restructures the dense skeleton of ``from_pretrained`` by the plan before the weights are loaded."""

    requires_calibration = True  # dense checkpoints cannot be quantized on loading: use compress

    def _process_model_before_weight_loading(self, model: nn.Module, **given: Any) -> nn.Module:
        files = [Path(f) for f in given.get("checkpoint_files") or ()]
        if len(files) != 1:
            msg = "from_pretrained did not say which file it loads: open the folder with tenfold's load_pretrained"
            raise CheckpointError(msg)
        _, plan = read_weights(files[0])
        try:
            return restructure_(model, plan)
        except TenfoldError as error:
            msg = f"{files[0].parent} was made for another class than {type(model).__name__}: {error}"
            raise CheckpointError(msg) from error

    def is_serializable(self, *unused: Any, **unknown: Any) -> bool:
        """Return whether ``model.save_pretrained`` may write the model: it would lose the plan."""
        del unused, unknown
        return False

    @property
    def is_trainable(self) -> bool:
        """True: the model can be trained like any other."""
        return True


if METHOD not in _auto.AUTO_QUANTIZER_MAPPING:  # the module may be reloaded
    _auto.register_quantization_config(METHOD)(TenfoldConfig)
    _auto.register_quantizer(METHOD)(TenfoldQuantizer)


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
    wanted = ["*.safetensors", "*.json", "*.yaml", "*.txt", "*.model", "*.jinja", "README.md"]
    found = api.snapshot_download(repo_id, revision=revision, local_dir=path, allow_patterns=wanted)
    read_weights(Path(found) / WEIGHTS)
    return Path(found)
