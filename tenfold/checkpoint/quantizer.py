"""The hook of transformers by which ``from_pretrained`` opens folders of compressed models.

Importing this module registers ``tenfold`` as what transformers calls a quantization method: one that gives the dense
skeleton its factorized layers before the weights are loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from tenfold import layers
from tenfold.checkpoint.modeling_template import resized
from tenfold.checkpoint.remote_code import forget_code_
from tenfold.checkpoint.weights_file import is_checkpoint, read_weights
from tenfold.errors import CheckpointError, TenfoldError, require
from tenfold.surgery import MARK, NOTE, find, plan_in_note, put, restructure_, separate_
from tenfold.surgery.narrowed_layers import MARK as NARROWED

_base: Any = require("transformers.quantizers.base", "hf")
_auto: Any = require("transformers.quantizers.auto", "hf")
_config: Any = require("transformers.utils.quantization_config", "hf")
METHOD = MARK["quant_method"]


class TenfoldConfig(_config.QuantizationConfigMixin):  # type: ignore[misc]
    """Mark of a compressed model in ``config.json``, whose entry ``tenfold`` holds the structure of the layers."""

    def __init__(self, **unknown: Any) -> None:
        del unknown
        self.quant_method = METHOD

    def to_dict(self) -> dict[str, Any]:
        """Return the entries of ``config.json``."""
        return dict(MARK)


class TenfoldQuantizer(_base.HfQuantizer):  # type: ignore[misc]
    """Restructures the dense skeleton of ``from_pretrained`` before the weights are loaded."""

    requires_calibration = True  # dense checkpoints cannot be quantized on loading: use compress

    def _process_model_before_weight_loading(self, model: nn.Module, **given: Any) -> nn.Module:
        files = [Path(f) for f in given.get("checkpoint_files") or ()]
        where = files[0].parent if files else "the folder"
        try:
            return _rebuilt(model, files)
        except TenfoldError as error:
            msg = f"{where} was made for another class than {type(model).__name__}: {error}"
            raise CheckpointError(msg) from error

    def _process_model_after_weight_loading(self, model: Any, **given: Any) -> nn.Module:
        del given
        forget_code_(model.config)
        whole: nn.Module = model
        return whole

    def is_serializable(self, *unused: Any, **unknown: Any) -> bool:
        """True: the config that ``model.save_pretrained`` writes says how the layers are rebuilt."""
        del unused, unknown
        return True

    @property
    def is_trainable(self) -> bool:
        """True: the model can be trained like any other."""
        return True


def _rebuilt(model: Any, files: list[Path]) -> nn.Module:
    """Return the model with its layers: by the note in the config, else by the plan in a file of ours.

    Such a file is read in any case, as that compares its digest.
    """
    ours = read_weights(files[0])[1] if len(files) == 1 and is_checkpoint(files[0]) else None
    note = getattr(model.config, NOTE, None)
    if note is None:
        if ours is None:
            msg = "neither its config nor its weights say how its layers are factorized"
            raise CheckpointError(msg)
        return restructure_(model, ours)
    plan = plan_in_note(note, model)
    model = separate_(model, plan.unrolled)
    for path, change in note["narrowed"].items():
        put(model, {path: resized(find(model, path), change, vars(layers))})
        vars(find(model, path))[NARROWED] = change
    return restructure_(model, plan)


if METHOD not in _auto.AUTO_QUANTIZER_MAPPING:  # the module may be reloaded
    _auto.register_quantization_config(METHOD)(TenfoldConfig)
    _auto.register_quantizer(METHOD)(TenfoldQuantizer)
