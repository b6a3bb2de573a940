"""Save and load a compressed model as a folder: weights with the plan in their header, plan, record, model card."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from tenfold.checkpoint.card import model_card
from tenfold.checkpoint.hub_facts import HubFacts
from tenfold.checkpoint.remote_code import FILE as MODELING
from tenfold.checkpoint.sentence_files import MODULES
from tenfold.checkpoint.shards import is_sharded, read_shards
from tenfold.checkpoint.weights_file import is_checkpoint, read_weights, write_weights
from tenfold.errors import CheckpointError, TenfoldError
from tenfold.files import locked, read_text, reason, replace, staged, write_text
from tenfold.layers import FactorizedLayer
from tenfold.records import Analysis, LayerPlan, OptionTable, Plan, RunRecord
from tenfold.records.parsing import seal
from tenfold.surgery import find, fused_pairs, restructure_, separated
from tenfold.tracing import copied

WEIGHTS, PLAN, RECORD, CARD = "model.safetensors", "plan.yaml", "record.json", "README.md"
ANALYSIS, OPTIONS, RECIPE, CONFIG = "analysis.json", "options.json", "recipe.yaml", "config.json"


def save(
    model: nn.Module,
    plan: Plan,
    path: str | Path,
    *,
    record: RunRecord | None = None,
    analysis: Analysis | None = None,
    table: OptionTable | None = None,
    beside: Callable[[Path], HubFacts | None] | None = None,
) -> Path:
    """Write a compressed model to the folder ``path``, atomically, and return the folder.

    Use it for what ``apply`` or a loop of your own made; ``Compressed.save`` adds the record.

    It holds ``model.safetensors``, with the plan for ``load`` in its header, ``plan.yaml`` and ``README.md`` to read,
    ``recipe.yaml`` to do the same again, and ``record.json`` if there is a record. The written plan names the batch
    norms that are fused in the model.

    An earlier checkpoint is replaced, other files in the folder stay. After an error it is unchanged; if the process is
    killed at any time, ``load`` returns the earlier model or the new one, beside which files may be missing, but none
    belongs to the other.

    Args:
        model: the compressed model.
        plan: carried out on it.
        path: the folder.
        record: of the run.
        analysis: spectra and errors for a report; written as ``analysis.json``.
        table: what the plan was chosen from, for ``tenfold explore``; written as ``options.json``.
        beside: called with a folder to write further files to (the configuration of the model, a tokenizer); what it
            returns goes into the card.

    Raises:
        CheckpointError: model and plan disagree, or the folder is not writable or holds other files.
    """
    _check_model(model, plan)
    plan = plan.replace(fused=fused_pairs(model), unrolled=separated(model))
    path = Path(path)
    check_target(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged(path) as partial:
            write_weights(partial / WEIGHTS, model.state_dict(), plan)
            (partial / WEIGHTS).chmod(0o644)  # safetensors writes for the owner alone
            write_text(partial / PLAN, plan.to_yaml())
            if record is not None:
                record.save_sealed(partial / RECORD)
            if analysis is not None:
                write_text(partial / ANALYSIS, seal(analysis.model_dump_json()))
            plan.recipe.save(partial / RECIPE)
            if table is not None:
                table.save(partial / OPTIONS)
            hub = None if beside is None else beside(partial)
            known = hasattr(getattr(model, "config", None), "model_type")
            write_text(partial / CARD, model_card(plan, record, hub, of_transformers=known))
            partial.chmod(0o755)
            with locked(Path(os.path.abspath(path))):  # noqa: PTH100 - links stay; two that save at the same time do not mix their files
                _swap(partial, path)
    except OSError as error:
        msg = f"cannot write the checkpoint {path}: {reason(error)}"
        raise CheckpointError(msg) from error
    return path


def load(skeleton: nn.Module, path: str | Path) -> tuple[nn.Module, Plan]:
    """Return the saved model, bit for bit, and its plan.

    Use it to run, score or train on what ``save`` wrote.

    The structure is rebuilt on a copy of ``skeleton``: a freshly built dense model of the same architecture, on any
    device (also ``meta``), with any weights. Dtypes are those that were saved; devices those of the skeleton, the CPU
    in place of ``meta``. Every tensor must be present with the right shape; nothing is unpickled.

    Args:
        skeleton: left unchanged.
        path: a folder written by ``save`` or ``compress_streamed``, or the one weights file in it.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, foreign, of another version, modified, or for another
            model.
    """
    path = Path(path)
    single = path / WEIGHTS if path.is_dir() else path
    state, plan = read_shards(path) if is_sharded(path) else read_weights(single)
    model = copied(skeleton)
    try:
        model = restructure_(model, plan)  # another module where the model is one layer itself
    except TenfoldError as error:
        msg = f"{path} was made for another model: {error}"
        raise CheckpointError(msg) from error
    _fill(model, state, path)
    return model, plan


def read_record(path: str | Path) -> RunRecord | None:
    """Return the record in a checkpoint folder; None if there is none.

    Raises:
        CheckpointError: it cannot be read.
    """
    file = Path(path) / RECORD
    if not file.is_file():
        return None
    try:
        return RunRecord.from_text(read_text(file, "a record"), source=str(file))
    except TenfoldError as error:
        raise CheckpointError(str(error)) from error


def check_target(path: str | Path) -> None:
    """Raise CheckpointError early if ``save`` could not write to the folder ``path``.

    A folder with an earlier checkpoint is fine, and so is an empty or missing one.
    """
    path = Path(path)
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not there.is_dir():
        msg = f"{there} is a file: choose a folder" if there == path else f"cannot write to {path}: {there} is a file"
        raise CheckpointError(msg)
    if there == path and any(path.iterdir()) and not _replaceable(path):
        msg = f"{path} holds other files: choose a new folder, or one with an earlier checkpoint"
        raise CheckpointError(msg)
    for folder in {there, next(p for p in path.absolute().parents if p.exists())}:
        try:
            with staged(folder / path.name):
                pass
        except OSError as error:
            msg = f"cannot write to {folder}: {reason(error)}. Choose another folder."
            raise CheckpointError(msg) from error


def _replaceable(path: Path) -> bool:
    """Whether a folder holds a checkpoint, even if damaged or incomplete."""
    return (path / WEIGHTS).is_file() and ((path / PLAN).is_file() or is_checkpoint(path / WEIGHTS))


def _check_model(model: nn.Module, plan: Plan) -> None:
    gone = sorted(set(plan.fused) - set(fused_pairs(model)))
    if gone:
        msg = (
            f"the plan has the batch norm {gone[0]!r} fused, the model does not: fuse it, or take that out of the plan"
        )
        raise CheckpointError(msg)
    has = {name: (m.format, m.rank) for name, m in model.named_modules() if isinstance(m, FactorizedLayer)}
    pairs = fused_pairs(model)
    fused = {*pairs, *pairs.values()}  # what a batch norm has left, or gone into
    for layer in plan.layers:
        if layer.path in plan.narrowed_paths:
            if layer.path not in fused:
                _check_narrowed(model, layer)
        elif layer.format and layer.path not in has:
            msg = f"the plan has {layer.path!r} factorized, the model does not: save what apply(model, plan) returned"
            raise CheckpointError(msg)
    planned = {name for layer in plan.layers if layer.format for name in (layer.path, *layer.aliases)}
    for name in has:
        if name not in planned:
            msg = f"the model has a factorized layer {name!r} that the plan does not know: save it with its own plan"
            raise CheckpointError(msg)


def _check_narrowed(model: nn.Module, layer: LayerPlan) -> None:
    held = sum(parameter.numel() for parameter in find(model, layer.path).parameters())
    if held != layer.after.params:
        msg = (
            f"the plan has {layer.path!r} narrowed to {layer.after.params:,} parameters, in the model it has {held:,}: "
            "save what apply(model, plan) returned"
        )
        raise CheckpointError(msg)


def _swap(new: Path, path: Path) -> None:
    """Replace the checkpoint in ``path`` by the folder ``new``; files that belong to no checkpoint stay.

    Files beside the old weights are removed before the weights are replaced, and new ones are added after: if this is
    killed at any time, the weights are complete and no file beside them belongs to others.
    """
    if not path.exists():
        replace(new, path)
        return
    own = (ANALYSIS, OPTIONS, RECIPE, PLAN, CARD, RECORD, CONFIG, MODELING, MODULES)
    beside = {*own, *(p.name for p in new.iterdir())} - {WEIGHTS}
    beside = {name for name in beside if not _equal(new / name, path / name)}
    old = new / ".old"
    old.mkdir()
    try:
        for name in beside:
            if (path / name).exists():
                (path / name).replace(old / name)
        replace(new / WEIGHTS, path / WEIGHTS)
    except BaseException:
        for file in old.iterdir():
            file.replace(path / file.name)
        raise
    for name in beside:
        if (new / name).exists():
            replace(new / name, path / name)


def _equal(one: Path, other: Path) -> bool:
    return one.is_file() and other.is_file() and one.read_bytes() == other.read_bytes()


def _fill(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Replace all parameters and buffers by the stored tensors; shared tensors stay shared."""
    slots = model.state_dict(keep_vars=True)
    missing, unexpected = sorted(set(slots) - set(state)), sorted(set(state) - set(slots))
    if missing or unexpected:
        parts = [f"lacks {missing[0]!r}" if missing else "", f"has {unexpected[0]!r} too many" if unexpected else ""]
        msg = f"{path} was made for another model: it {' and '.join(filter(None, parts))}"
        raise CheckpointError(msg)
    for name, slot in slots.items():
        if slot.shape != state[name].shape:
            msg = f"{path} was made for another model: {name} is {tuple(state[name].shape)}, not {tuple(slot.shape)}"
            raise CheckpointError(msg)
    empty = [name for name, b in model.named_buffers() if b.is_meta and name not in slots]
    if empty:
        msg = (
            f"the buffer {empty[0]!r} is not stored (persistent=False) and has no values on the meta device: build the "
            "model on the CPU"
        )
        raise CheckpointError(msg)
    renewed: dict[int, Tensor] = {}
    for name, slot in slots.items():
        if id(slot) not in renewed:
            renewed[id(slot)] = _renew(slot, state[name])
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        held = module._parameters if leaf in module._parameters else module._buffers
        held[leaf] = renewed[id(slot)]  # type: ignore[assignment]


def _renew(slot: Tensor, stored: Tensor) -> Tensor:
    device = "cpu" if slot.is_meta else slot.device
    tensor = stored.to(device, copy=True)
    return nn.Parameter(tensor, slot.requires_grad) if isinstance(slot, nn.Parameter) else tensor
