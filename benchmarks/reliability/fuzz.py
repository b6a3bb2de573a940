"""Damage every file that tenfold reads, and look at what becomes of it.

What is read from a damaged file is the same as from a whole one, is refused in one line, or is another valid thing,
which is right for what people edit (plans, recipes) or bring (their weights) and for nothing else.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tenfold import checkpoint
from tenfold.allocation import Schedule
from tenfold.checkpoint.state_dicts import read_state_dict
from tenfold.errors import TenfoldError
from tenfold.iterative import Training, compress_iteratively, stages, tune_stage
from tenfold.pipeline import compress
from tenfold.planning import Sensitivity
from tenfold.profiling import profile
from tenfold.profiling.latency.cache import LatencyCache
from tenfold.records import OptionTable, Plan, Recipe
from tenfold.reporting.run_files import read_run
from tenfold.runtime import Runtime
from tenfold.training import CachedLogits, TuneConfig, TuneProgress, finetune

QUIET = Runtime(measure=False)
CONFIG = TuneConfig(epochs=3, lr=0.05)
RECIPE, SCHEDULE = {"budget": {"macs": 0.5}, "formats": ["low_rank"]}, {"rounds": 2, "epochs": 2}


@dataclass(frozen=True)
class Target:
    """A file, and what is made of it.

    Attributes:
        path: of the file.
        read: what it is read for; its result is compared with that of the whole file.
        editable: whether another valid result is right.
        root: folder that is restored before each reading, if reading changes more than the file.
    """

    path: Path
    read: Callable[[], Any]
    editable: bool = False
    root: Path | None = None


def damaged(raw: bytes, flips: int, truncations: int, seed: int) -> Iterator[bytes]:
    """Yield the contents of a file with one bit flipped, and with its end cut off, at random places."""
    chance = random.Random(seed)  # noqa: S311 - not for secrets
    for _ in range(flips):
        changed = bytearray(raw)
        changed[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        yield bytes(changed)
    for _ in range(truncations):
        yield raw[: chance.randrange(len(raw))]


def fuzz(target: Target, flips: int, truncations: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Return how often a damaged file was read the same, refused, or read as another; and what must not be."""
    raw, counts, faults = target.path.read_bytes(), Counter[str](), []
    kept = None if target.root is None else shutil.copytree(target.root, f"{target.root}.kept", dirs_exist_ok=True)
    expected = target.read()
    if kept is not None:
        shutil.rmtree(target.root)
        shutil.copytree(kept, target.root)
    for number, content in enumerate(damaged(raw, flips, truncations, seed)):
        if target.root is not None:
            shutil.rmtree(target.root)
            shutil.copytree(kept, target.root)
        target.path.write_bytes(content)
        try:
            outcome = "same" if target.read() == expected else "another"
        except TenfoldError as error:
            outcome = "refused" if "\n" not in str(error) else "several lines"
            message = str(error)
        except Exception as error:  # noqa: BLE001 - that there is none is what is to be shown
            outcome, message = type(error).__name__, str(error)
        counts[outcome] += 1
        allowed = {"same", "refused"} | ({"another"} if target.editable else set())
        if outcome not in allowed:
            faults.append(f"damage {number}: {outcome} {message if outcome not in ('same', 'another') else ''}"[:300])
    if kept is not None:
        shutil.rmtree(target.root)
        shutil.move(kept, target.root)
    target.path.write_bytes(raw)
    return counts, faults


def targets(folder: Path) -> dict[str, Target]:
    """Return every kind of file by name, written to a folder."""
    torch.manual_seed(0)
    net, (x, y) = _net(), _data()
    found: dict[str, Target] = {}

    out = compress(net, x[:1], RECIPE, data=[x], runtime=QUIET).save(folder / "out")
    found["model.safetensors"] = Target(out / "model.safetensors", lambda: _bits(checkpoint.load(_net(), out)[0]))
    for name, kind in (("plan.yaml", Plan), ("recipe.yaml", Recipe)):
        found[name] = Target(out / name, lambda file=out / name, kind=kind: _made(kind.load(file)), editable=True)
    found["record.json"] = Target(out / "record.json", lambda: checkpoint.read_record(out).to_json())
    found["analysis.json"] = Target(out / "analysis.json", lambda: read_run(out))
    found["options.json"] = Target(
        out / "options.json", lambda: OptionTable.load(out / "options.json").model_dump_json()
    )

    schedule = folder / "schedule.yaml"
    schedule.write_text(Schedule(rounds=2, epochs=1).to_yaml())
    found["schedule.yaml"] = Target(
        schedule,
        lambda: Schedule.from_text(schedule.read_text(encoding="utf-8", errors="replace"), source=str(schedule)),
        editable=True,
    )

    table = folder / "sensitivity.json"

    def sensitivity() -> Sensitivity:
        return Sensitivity(net, profile(net, x[:1]), {"formats": ["low_rank"]}, batches=[x], path=table)

    sensitivity().measure(3)
    found["sensitivity table"] = Target(table, lambda: str(sensitivity().table))

    errors = folder / "errors.json"
    rule = {"rule": {"name": "error", "rel_error": 0.5}, "formats": ["tucker2", "low_rank"]}
    found["error cache"] = Target(errors, lambda: _plan(_convs(), rule, QUIET.replace(cache=errors)))
    found["error cache"].read()

    cache = LatencyCache(folder / "latency", {"device": "cpu"})
    cache.save({"conv": [1.5, 1.25], "linear": [0.5]})
    found["latency cache"] = Target(Path(str(cache.path)), lambda: _or_none(cache.load()))

    logits = folder / "logits"
    batches = CachedLogits(net, lambda _: [(x, y)], logits, views=1)
    list(batches(0))
    found["cached logits"] = Target(next(logits.iterdir()), lambda: [t.numpy().tobytes() for _, (_, t) in batches(0)])

    _interrupted_tuning(folder / "tuning")
    file = folder / "tuning" / "tuning.safetensors"
    found["training snapshot"] = Target(file, lambda: _tuned(folder / "tuning"), root=folder / "tuning")

    run = folder / "run"
    _interrupted_stages(run)
    for file in sorted(p for p in run.rglob("*") if p.suffix in {".json", ".safetensors"} and p != run / "record.json"):
        found[f"stages: {file.relative_to(run)}"] = Target(file, lambda: _staged(run), root=run)

    torch.save({"state_dict": net.state_dict()}, folder / "net.pth")
    save_file(net.state_dict(), folder / "net.safetensors")
    for name in ("net.pth", "net.safetensors"):
        found[name] = Target(
            folder / name, lambda file=folder / name: _of(read_state_dict(file).tensors), editable=True
        )
    return found


def quietly(work: Callable[[], Any]) -> Any:
    """Do something without warnings and log lines."""
    logging.getLogger("tenfold").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return work()


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def _convs() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()


def _data() -> tuple[Tensor, Tensor]:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    return x, x[:, :4].argmax(1)


def _of(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {
        name: t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in tensors.items()
    }


def _bits(model: nn.Module) -> dict[str, bytes]:
    return _of(model.state_dict())


def _plan(net: nn.Module, recipe: Any, runtime: Runtime) -> str:
    return compress(net, torch.zeros(1, 4, 8, 8), recipe, runtime=runtime).plan.to_json()


def _made(recipe: Plan | Recipe) -> dict[str, bytes]:
    return _bits(compress(_net(), _data()[0][:1], recipe, runtime=QUIET).model)


def _or_none(samples: dict[str, list[float]]) -> str:
    """Return samples as text; a cache that is refused has none, and what they were is measured again."""
    if not samples:
        msg = "measured again"
        raise TenfoldError(msg)
    return json.dumps(samples)


class _StopError(Exception):
    pass


def _stop(record: Any) -> None:
    if record.epoch == 1:
        raise _StopError


def _batches(_: int) -> list[tuple[Tensor, Tensor]]:
    return [_data()]


def _interrupted_tuning(folder: Path) -> None:
    with suppress(_StopError):
        finetune(_net(), _batches, CONFIG, folder=folder, progress=TuneProgress(_stop))


def _tuned(folder: Path) -> dict[str, bytes]:
    model = _net()
    finetune(model, _batches, CONFIG, folder=folder)
    return _bits(model)


def _interrupted_stages(folder: Path) -> None:
    """Leave a run with one stage that is complete, and one that is half trained."""
    how = Runtime(measure=False, folder=folder, identity=CONFIG.replace(epochs=0).to_json())
    run, result = stages(_net(), _data()[0][:1], RECIPE, SCHEDULE, runtime=how), None
    stage = next(run)
    result = tune_stage(stage, _batches, CONFIG)
    stage = run.send(result)
    with suppress(_StopError):
        tune_stage(stage, _batches, CONFIG, progress=TuneProgress(_stop))
    run.close()


def _staged(folder: Path) -> dict[str, bytes]:
    how = Runtime(measure=False, folder=folder)
    tune = Training(_batches, CONFIG)
    made = compress_iteratively(_net(), _data()[0][:1], RECIPE, SCHEDULE, tune=tune, runtime=how)
    return _bits(made.model) | {"plan": made.plan.to_json().encode()}
