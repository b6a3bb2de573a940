"""Write what was compressed block by block as one folder: a file of weights for each block, with an index."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tenfold.checkpoint.card import model_card
from tenfold.checkpoint.hub_facts import HubFacts
from tenfold.checkpoint.model_folder import CARD, OPTIONS, PLAN, RECIPE, RECORD
from tenfold.checkpoint.shards import INDEX, index_text
from tenfold.errors import CheckpointError
from tenfold.files import link, reason, replace, staged, write_text
from tenfold.records import OptionTable, Plan, RunRecord


def write_folder(
    path: Path,
    shards: Sequence[Path],
    plan: Plan,
    record: RunRecord,
    table: OptionTable,
    beside: Callable[[Path], HubFacts | None] | None = None,
) -> Path:
    """Move files of weights into a new folder, with plan, record and card; the folder is there whole or not at all.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged(path) as partial:
            placed = []
            for number, shard in enumerate(shards, 1):
                placed.append(partial / f"model-{number:05d}-of-{len(shards):05d}.safetensors")
                link(shard, placed[-1])
                placed[-1].chmod(0o644)
            write_text(partial / INDEX, index_text(placed, plan))
            write_text(partial / PLAN, plan.to_yaml())
            record.save_sealed(partial / RECORD)
            plan.recipe.save(partial / RECIPE)
            table.save(partial / OPTIONS)
            write_text(partial / CARD, model_card(plan, record, None if beside is None else beside(partial)))
            partial.chmod(0o755)
            replace(partial, path)
    except OSError as error:
        msg = f"cannot write {path}: {reason(error)}"
        raise CheckpointError(msg) from error
    return path
