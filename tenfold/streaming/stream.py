"""compress_streamed(): a model that does not fit into memory, from a folder of weights to a folder of weights."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tenfold import __version__
from tenfold.allocation import choose, rule_of
from tenfold.checkpoint.hub_facts import HubFacts
from tenfold.checkpoint.model_folder import CONFIG
from tenfold.checkpoint.pretrained import write_config
from tenfold.checkpoint.shards import WeightFiles
from tenfold.errors import CheckpointError, DataError, FileError, RecipeError
from tenfold.files import in_use, read_text, write_text
from tenfold.pipeline import measurement
from tenfold.planning import tabulate
from tenfold.planning.decide import refuse_empty
from tenfold.planning.eligible import check_formats
from tenfold.planning.equal_heads import with_one_head_size
from tenfold.planning.unit_kinds import kinds_of
from tenfold.profiling import environment, profile
from tenfold.records import OptionTable, Plan, Recipe, RunRecord, parse_size
from tenfold.runtime import Runtime
from tenfold.streaming.block_fits import Fitting
from tenfold.streaming.bounds import check_disk, with_width, within
from tenfold.streaming.chain import meta_inputs
from tenfold.streaming.estimate import Needs
from tenfold.streaming.network import Network
from tenfold.streaming.network_parts import Lead, Tail
from tenfold.streaming.on_ray import run_on_ray
from tenfold.streaming.output import write_folder
from tenfold.streaming.part_tables import LEAD, TAIL, inside, joined, recipe_of_part
from tenfold.streaming.ranks import Ranks
from tenfold.streaming.skeletons import empty_pretrained, on_meta
from tenfold.streaming.statistics import Statistics
from tenfold.surgery import note_in_config_, restructure_
from tenfold.tensors import normal_tensors
from tenfold.tracing import copied
from tenfold.tracing.input_batches import gathered
from tenfold.tracing.inputs import digest_batches
from tenfold.tracing.samples import count_samples

IDENTITY, WIDTH = "run.txt", "width.json"
MAX_CACHE = "16MiB"  # more saves no time: within a block there is little to compute again
_TOKENIZER = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "spiece", "chat_template")
SCORED = {"expected_drop", "measured_drop"}  # columns that whole models are scored for

logger = logging.getLogger("tenfold")


@dataclass(frozen=True, eq=False)
class Streamed:
    """What ``compress_streamed`` returns: where the model is, the plan behind it, and the record of both.

    Attributes:
        path: of the folder that was written.
        plan: carried out.
        record: of the run.
        table: what the plan was chosen from.
        needs: what it was to take of memory and of disk at most, as was said before.
    """

    path: Path
    plan: Plan
    record: RunRecord
    table: OptionTable
    needs: Needs


@normal_tensors()
def compress_streamed(
    weights: str | Path,
    out: str | Path,
    recipe: Recipe | Mapping[str, Any] | str,
    *,
    data: Iterable[Any] | None = None,
    example_inputs: Any = None,
    skeleton: nn.Module | None = None,
    blocks: Sequence[str] | None = None,
    runtime: Runtime | None = None,
) -> Streamed:
    """Compress a model that is larger than the memory: one block at a time, from the disk to the disk.

    Use it where ``compress`` would not fit; the plan is the same, and so are the factors, up to rounding. The model has
    to be a chain of blocks, such as the layers of a transformer or the stages of a residual network. What is in memory
    at a time is one block with its statistics, whatever the depth and the number of samples; what lies between blocks
    is on the disk.

    Two passes. The first finds what each layer could become: forward through the blocks, and back with the gradients.
    The plan is chosen from all of that at once, under one budget. The second carries it out, front to back. A run that
    was killed goes on where it was, to the same bytes.

    Args:
        weights: a folder of safetensors files, in one piece or in shards with an index. With a ``config.json`` of
            transformers, that says what the model is.
        out: the folder to write: weights in shards, index, plan, record and card; for a model of transformers config
            and tokenizer too. ``tenfold.load`` and ``load_pretrained`` open it, and so does transformers.
        recipe: what is wanted, as for ``compress``; budgets of parameters, MACs or bytes.
        data: batches of inputs, 24 or more; small ones, since one at a time goes through a block. Without, weights
            alone decide.
        example_inputs: that costs are counted for; the first sample of the data if None.
        skeleton: the model with its parameters on the meta device, where the folder has no config.
        blocks: paths or patterns of the blocks; rows of modules of one class if None.
        runtime: workers and progress. ``max_cache`` are bytes of activations of all samples that are held within one
            block, of the original and of the new one; 16 MiB if None. ``max_memory`` bounds what this
            process takes. ``folder`` is for files of the run, a hidden one beside ``out`` if None, which is removed in
            the end. It holds what lies between blocks: for each token and block as many numbers as the model is wide.

    Raises:
        CheckpointError: weights are missing, damaged, or not those of the model; ``out`` is there already.
        RecipeError: the recipe wants what needs the whole model at once: latencies, scores, divergences, refinement;
            or the least memory that it takes is more than ``max_memory``.
        PlanError: the model is no chain of blocks; or nothing would be factorized.
        DataError: too few batches.
        FileError: the folder belongs to another run, another process works there, or the disk is too small.
    """
    wanted = Recipe.of(recipe)
    network = looked_at(weights, out, wanted, skeleton=skeleton, data=data, example=example_inputs, blocks=blocks)
    return carried_out(network, Path(out), blocks, runtime or Runtime())


@normal_tensors()
def carried_out(
    network: Network,
    out: Path,
    blocks: Sequence[str] | None,
    runtime: Runtime,
    about: Mapping[str, Any] | None = None,
) -> Streamed:
    """Do the work of ``compress_streamed``, once all is looked at.

    Args:
        network: what ``looked_at`` returned.
        out: the folder to write.
        blocks: as they were given.
        runtime: workers, progress, folder and bounds.
        about: what the record is to say besides, such as the task and the command.
    """
    if runtime.workers.backend == "ray":
        folder = None if runtime.folder is None else Path(runtime.folder).absolute()  # actors start elsewhere
        files = WeightFiles.of(network.files.folder.absolute())
        work = partial(_carried_out, replace(network, files=files), out.absolute(), blocks, about)
        return replace(run_on_ray(work, runtime.replace(folder=folder)), path=out)
    return _carried_out(network, out, blocks, about, runtime, Ranks.of(runtime.accelerator))


def _carried_out(
    network: Network,
    out: Path,
    blocks: Sequence[str] | None,
    about: Mapping[str, Any] | None,
    runtime: Runtime,
    ranks: Ranks,
) -> Streamed:
    """Do what this process does of a run."""
    ranks = ranks.dealt(network.fitting, network.judging, len(network.batches))
    seconds: dict[str, float] = {}
    work = Path(runtime.folder) if runtime.folder is not None else out.with_name(f".{out.name}.streaming")
    identity, cache = _identity(network, blocks, runtime, ranks.count), runtime.cache_bytes(MAX_CACHE)
    needs = ranks.from_main(within(network, cache, _limit(runtime)))
    runtime = runtime.replace(max_cache=needs.max_cache)
    if ranks.main:
        logger.info(needs.in_words())
        check_disk(needs, work, out)
    with in_use(_made(work) / ".lock", work) if ranks.main else nullcontext():
        if ranks.main:
            _claim(work, identity)
        ranks.wait()
        network = with_width(network, ranks.from_main(_kept_width(work, needs.max_width) if ranks.main else None))
        statistics = Statistics(network, work, runtime, ranks) if network.batches else None
        with runtime.step("weigh blocks", seconds):
            table = _table(network, statistics, runtime, ranks)
        cost = network.profile.replace(units=tuple(own.unit for own in table.units))
        plan = with_one_head_size(ranks.from_main(choose(table)), cost)
        refuse_empty(plan, cost)
        fitting = Fitting(network, plan, statistics, work, runtime, ranks)
        with runtime.step("fit blocks", seconds):
            plan, agreed = fitting.run()
        small = note_in_config_(restructure_(copied(network.skeleton), plan))
        record = RunRecord(
            before=measurement(cost),
            after=measurement(profile(on_meta(small), meta_inputs(network.example))),
            agreement=agreed,
            plan=plan,
            seconds=seconds,
            settings=_settings(network, needs),
            environment=environment(),
        ).replace(**(about or {}))
        source = network.files.folder
        beside = partial(_beside, small, source) if (source / CONFIG).is_file() else None
        if ranks.main:
            write_folder(out, fitting.shards, plan, record, table, beside)
        ranks.wait()
    if runtime.folder is None and ranks.main:
        shutil.rmtree(work, ignore_errors=True)
    return Streamed(out, plan, record, table, needs)


def looked_at(
    weights: str | Path,
    out: str | Path,
    recipe: Recipe,
    *,
    skeleton: nn.Module | None = None,
    data: Iterable[Any] | None = None,
    example: Any = None,
    blocks: Sequence[str] | None = None,
) -> Network:
    """Look at recipe, weights, model and data before any work begins; the errors are those of ``compress_streamed``."""
    _check_recipe(recipe)
    if Path(out).exists():
        msg = f"{out} is there already: choose a new folder, or remove it"
        raise CheckpointError(msg)
    folder = Path(weights).expanduser()
    files = WeightFiles.of(folder)
    model = _skeleton(folder, skeleton)
    batches = [] if data is None else list(gathered(data, model, example, torch.device("cpu")))
    if example is None and not batches:
        msg = "without data, example_inputs= says what costs are counted for"
        raise DataError(msg)
    deciding = batches if recipe.calibration.plans else []
    return Network.of(model, files, recipe, batches[0] if example is None else example, deciding, blocks)


def _table(network: Network, statistics: Statistics | None, runtime: Runtime, ranks: Ranks) -> OptionTable:
    """Return the option table of the whole."""
    itemsizes = {
        path: next((p.element_size() for p in network.skeleton.get_submodule(path).parameters()), 4)
        for path in (layer.path for layer in network.profile.layers)
    }
    tables = _by_weight(network, runtime, ranks) if statistics is None else statistics.run()
    return joined(network.profile, network.recipe, tables, network.kept, itemsizes)


def _by_weight(network: Network, runtime: Runtime, ranks: Ranks) -> dict[str, OptionTable]:
    """Return the tables of all parts as the weights alone have it; each process looks at some of the blocks."""
    found: dict[str, OptionTable] = {}
    parts = (LEAD, *network.chain.blocks, TAIL)
    for number in range(ranks.index, len(parts), ranks.count):
        part = parts[number]
        if part in (LEAD, TAIL):
            with network.outer() as outer:
                found[part] = _blind(network, part, (Lead if part == LEAD else Tail)(outer, network.chain), runtime)
        else:
            with network.block(number - 1) as block:
                found[part] = _blind(network, part, block, runtime)
    known = {part: table for own in ranks.everyones(found) for part, table in own.items()}
    return {part: known[part] for part in parts}


def _blind(network: Network, part: str, module: nn.Module, runtime: Runtime) -> OptionTable:
    paths = network.parts[part]
    recipe = recipe_of_part(network.recipe, part, paths, network.kept)
    return tabulate(module, inside(network.profile, part, paths), recipe, runtime=Runtime(workers=runtime.workers))


def _skeleton(folder: Path, skeleton: nn.Module | None) -> nn.Module:
    if skeleton is not None:
        return skeleton.eval()
    if not (folder / CONFIG).is_file():
        msg = f"{folder} has no {CONFIG} that says what the model is: pass skeleton=, the model on the meta device"
        raise CheckpointError(msg)
    return empty_pretrained(folder)


def _check_recipe(recipe: Recipe) -> None:
    """Raise RecipeError for what needs the whole model at once."""
    calibration, rule = recipe.calibration, rule_of(recipe.rule)
    check_formats(recipe)
    kinds_of(recipe)
    wrong = {
        "a latency, or a runtime": recipe.timed,
        "calibration.metric: divergence": calibration.measures,
        "calibration.refine": bool(calibration.refine),
        f"calibration.method: {calibration.method}": calibration.method not in ("sequential", "none"),
        "fuse_batchnorm": recipe.fuse_batchnorm,
        f"the rule {recipe.rule['name']}": bool(rule.patterns) or bool(SCORED & {*rule.columns}),
    }
    for what, asked in wrong.items():
        if asked:
            msg = f"{what} needs the whole model at once, and a streamed run has one block of it: leave it out"
            raise RecipeError(msg)


def _beside(model: nn.Module, source: Path, folder: Path) -> HubFacts:
    """Write what opens a model of transformers, and the files of its tokenizer, which are those of the original."""
    for file in source.iterdir():
        if file.is_file() and file.name.startswith(_TOKENIZER) and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
    return write_config(model, folder)


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"cannot make the folder {folder}: {error.strerror}. Choose another one."
        raise FileError(msg) from error
    return folder


def _settings(network: Network, needs: Needs) -> dict[str, Any]:
    """Return what the record says of the run besides its recipe."""
    samples = {"calibration_samples": count_samples(network.batches)} if network.batches else {}
    return {**samples, "memory_bytes": needs.memory, "disk_bytes": needs.disk}


def _limit(runtime: Runtime) -> int | None:
    return None if runtime.max_memory is None else parse_size(runtime.max_memory)


def _kept_width(folder: Path, width: int | None) -> int | None:
    """Return beyond which width inputs are sketched: what a run began with, it goes on with."""
    file = folder / WIDTH
    if not file.is_file():
        write_text(file, json.dumps(width))
    kept: int | None = json.loads(read_text(file, "a width"))
    return kept


def _identity(network: Network, blocks: Sequence[str] | None, runtime: Runtime, processes: int) -> str:
    """Return in words what the outcome of a run depends on."""
    files = {stored.file for stored in network.files.tensors.values()}
    known = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return (
        f"tenfold {__version__}\nmodel {network.profile.model}\nweights {known}\nblocks {blocks}\n"
        f"processes {processes}\n"
        f"data {digest_batches(network.batches)}\nmemory {_limit(runtime)}\nrecipe {network.recipe.to_yaml()}"
    )


def _claim(folder: Path, identity: str) -> None:
    """Mark a folder as that of this run; raise FileError where it is that of another."""
    mark = folder / IDENTITY
    if mark.is_file():
        if read_text(mark, "the mark of a run") != identity:
            msg = f"{folder} holds another run: other weights, data or recipe. Choose another folder, or remove it."
            raise FileError(msg)
        logger.info("going on with the run in %s", folder)
        return
    if any(path.name != ".lock" and not path.name.startswith(f".{IDENTITY}") for path in folder.iterdir()):
        msg = f"{folder} holds other files: choose a new folder"
        raise FileError(msg)
    write_text(mark, identity)
