"""Checkpoints: what comes back is what went in, and what is not whole or not ours is refused."""

from __future__ import annotations

import copy
import json
import os
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tenfold.allocation import choose
from tenfold.checkpoint import check_target, digest, load, model_folder, read_record, save
from tenfold.errors import CheckpointError, PlanError, TenfoldError
from tenfold.pipeline import compress
from tenfold.planning import plan as make_plan
from tenfold.profiling import profile
from tenfold.records import OptionTable, Plan, Recipe
from tenfold.reporting.run_files import read_run
from tenfold.runtime import Runtime
from tenfold.surgery import apply


class Tied(nn.Module):
    """An embedding whose weight is the head's too, with a linear layer between."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.middle = nn.Linear(16, 16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.embedding(x)))


def convs() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1, groups=2, padding_mode="reflect"),
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 16, (3, 5), stride=(2, 1), bias=False),
        nn.ConvTranspose2d(16, 12, 3, stride=2),
        nn.Flatten(2),
        nn.Conv1d(12, 12, 3, dilation=2),
    )


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 8))


CASES: dict[str, tuple[Any, Any]] = {
    "convs": (convs, lambda: torch.randn(2, 8, 9, 9)),
    "linears": (dense, lambda: torch.randn(3, 16)),
    "tied": (Tied, lambda: torch.randint(40, (2, 5))),
}


def small(model: nn.Module, inputs: Any, formats: tuple[str, ...] = ("low_rank",)) -> tuple[nn.Module, Plan]:
    found = profile(model, inputs)
    rule = {"name": "ratio", "share": 0.5, "of": "params"}
    plan = make_plan(model, found, Recipe(rule=rule, formats=formats, keep_ends=False))
    assert plan.factorized
    return apply(model, plan), plan


def same_bits(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    return all(ours[k].dtype == theirs[k].dtype and torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("formats", [("low_rank",), ("spatial", "low_rank"), ("tucker2", "low_rank")])
@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_exact(case: str, formats: tuple[str, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    build, inputs = CASES[case]
    x = inputs()
    model = build().to(dtype).eval()
    x = x.to(dtype) if x.is_floating_point() else x
    made, plan = small(model, x, formats)
    path = save(made, plan, tmp_path / "out")
    torch.manual_seed(1)
    skeleton = build().to(dtype).eval()
    before = copy.deepcopy(skeleton.state_dict())
    loaded, read = load(skeleton, path)
    assert read == plan
    assert same_bits(made, loaded)
    with torch.no_grad():
        assert torch.equal(made(x), loaded(x))
    assert all(torch.equal(before[k], v) for k, v in skeleton.state_dict().items())


def test_the_stored_dtype_counts(tmp_path: Path) -> None:
    made, plan = small(dense().bfloat16(), torch.randn(3, 16, dtype=torch.bfloat16))
    loaded, _ = load(dense(), save(made, plan, tmp_path / "out"))
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_meta_skeleton(tmp_path: Path) -> None:
    made, plan = small(convs(), torch.randn(2, 8, 9, 9))
    path = save(made, plan, tmp_path / "out")
    with torch.device("meta"):
        skeleton = convs()
    loaded, _ = load(skeleton, path)
    assert {t.device.type for t in loaded.state_dict().values()} == {"cpu"}
    assert same_bits(made, loaded)


def test_tied_weights_stay_tied_and_are_stored_once(tmp_path: Path) -> None:
    made, plan = small(Tied(), torch.zeros(2, 3, dtype=torch.long))
    path = save(made, plan, tmp_path / "out")
    stored = load_file(path / "model.safetensors")
    assert ("head.weight" in stored) + ("embedding.weight" in stored) == 1
    loaded, _ = load(Tied(), path)
    assert loaded.head.weight is loaded.embedding.weight


def test_frozen_stays_frozen_as_in_the_skeleton(tmp_path: Path) -> None:
    made, plan = small(dense(), torch.randn(3, 16))
    path = save(made, plan, tmp_path / "out")
    skeleton = dense()
    skeleton[3].requires_grad_(False)
    loaded, _ = load(skeleton, path)
    assert not loaded[3].weight.requires_grad
    assert all(isinstance(p, nn.Parameter) for p in loaded.parameters())
    loaded(torch.randn(2, 16)).sum().backward()


def test_factorized_layers_are_trained_as_those_of_the_skeleton(tmp_path: Path) -> None:
    made, plan = small(dense(), torch.randn(3, 16))
    path = save(made, plan, tmp_path / "out")
    skeleton = dense()
    skeleton[2].requires_grad_(requires_grad=False)
    loaded, _ = load(skeleton, path)
    trained = {layer.path: [p.requires_grad for p in loaded[int(layer.path)].parameters()] for layer in plan.factorized}
    assert all(all(found) == (path != "2") == any(found) for path, found in trained.items())
    assert "2" in trained


def test_values_that_are_stored_nowhere_are_missed(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = dense()
            self.register_buffer("scale", torch.arange(8.0), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.inside(x) * self.scale

    made, plan = small(Scaled(), torch.randn(3, 16))
    path = save(made, plan, tmp_path / "out")
    with torch.device("meta"):
        skeleton = Scaled()
    with pytest.raises(CheckpointError, match="'scale' is not stored"):
        load(skeleton, path)


def test_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    class Extra(nn.Sequential):
        def get_extra_state(self) -> dict[str, int]:
            return {"version": 1}

        def set_extra_state(self, state: Any) -> None:
            pass

    made, plan = small(Extra(*dense()), torch.randn(3, 16))
    with pytest.raises(CheckpointError, match="_extra_state is a dict"):
        save(made, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_planned_again(tmp_path: Path) -> None:
    x = torch.randn(3, 16)
    made, _ = small(dense(), x)
    found = profile(made, x)
    again = make_plan(made, found, {"rule": {"name": "fixed", "ranks": {"2": 3}}, "formats": "low_rank"})
    less = apply(made, again)
    assert less[2].rank == {"rank": 3}
    loaded, _ = load(dense(), save(less, again, tmp_path / "out"))  # the skeleton is dense all the same
    assert same_bits(less, loaded)
    assert loaded[0].rank == made[0].rank


def test_files_are_readable_for_all_and_hold_the_record(tmp_path: Path) -> None:
    result = compress(dense(), torch.randn(3, 16), "macs=0.7", runtime=Runtime(measure=False))
    path = result.save(tmp_path / "deep" / "out")
    beside = {"plan.yaml", "recipe.yaml", "record.json", "README.md", "analysis.json", "options.json"}
    assert {p.name for p in path.iterdir()} == beside | {"model.safetensors"}
    assert {stat.S_IMODE(p.stat().st_mode) for p in path.iterdir()} == {0o644}
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    assert read_record(path) == result.record
    assert Plan.load(path / "plan.yaml") == result.plan
    assert Recipe.load(path / "recipe.yaml") == result.plan.recipe == Recipe.of("macs=0.7")
    assert choose(OptionTable.load(path / "options.json")).after == result.plan.after
    (path / "record.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"record\.json"):
        read_record(path)
    assert read_record(tmp_path) is None


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(5)
    made, plan = small(dense(), torch.randn(3, 16))
    return save(made, plan, tmp_path / "out")


def header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def rewrite(path: Path, tensors: dict[str, Tensor] | None = None, **changes: str) -> None:
    file = path / "model.safetensors"
    save_file(tensors or load_file(file), file, metadata=header(file) | changes)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        load(dense(), tmp_path / "nowhere")


@pytest.mark.parametrize("keep", [0, 4, 300, -1])
def test_truncated(saved: Path, keep: int) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="damaged"):
        load(dense(), saved)


def test_foreign(saved: Path) -> None:
    save_file(dense().state_dict(), saved / "model.safetensors")
    with pytest.raises(CheckpointError, match="not written by tenfold"):
        load(dense(), saved)
    (saved / "model.safetensors").write_bytes(b"PK\x03\x04 a pickle of torch")
    with pytest.raises(CheckpointError, match="damaged or not a safetensors file"):
        load(dense(), saved)


def test_newer_version(saved: Path) -> None:
    rewrite(saved, version="99")
    with pytest.raises(CheckpointError, match=r"version 99.*upgrade"):
        load(dense(), saved)


def test_an_older_plan(saved: Path) -> None:
    plan = json.loads(header(saved / "model.safetensors")["plan"])
    older = {"version": 1, "rule": {"name": "ratio"}, "budget": {}, "folded": {}, "opened": {}}
    del plan["recipe"]
    text = json.dumps(plan | older)
    tensors = load_file(saved / "model.safetensors")
    rewrite(saved, plan=text, digest=digest(tensors, text + header(saved / "model.safetensors")["aliases"]))
    with pytest.raises(CheckpointError, match=r"plan has version 1, this tenfold reads 2: make it again"):
        load(dense(), saved)
    (saved / "plan.yaml").write_text(text)
    with pytest.raises(PlanError, match=r"plan has version 1, this tenfold reads 2: make it again"):
        Plan.load(saved / "plan.yaml")
    (saved / "record.json").write_text('{"version": 1, "plan": {}}')
    with pytest.raises(CheckpointError, match=r"record has version 1, this tenfold reads 2: make it again"):
        read_record(saved)


def test_one_changed_bit(saved: Path) -> None:
    file = saved / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="changed after it was written"):
        load(dense(), saved)


def test_a_changed_plan(saved: Path) -> None:
    plan = json.loads(header(saved / "model.safetensors")["plan"])
    plan["recipe"]["seed"] = 7
    rewrite(saved, plan=json.dumps(plan))
    with pytest.raises(CheckpointError, match="changed after it was written"):
        load(dense(), saved)


@pytest.mark.parametrize("aliases", ['{"0.stages.0.weight": "3.weight"}', '{"3.weight": "3.bias"}', "not json"])
def test_a_changed_table_of_shared_tensors(saved: Path, aliases: str) -> None:
    rewrite(saved, aliases=aliases)
    with pytest.raises(CheckpointError, match="changed after it was written"):
        load(dense(), saved)


@pytest.mark.parametrize(
    "other",
    [
        lambda: nn.Sequential(nn.Linear(16, 32)),
        lambda: nn.Sequential(nn.Linear(16, 31), nn.ReLU(), nn.Linear(31, 32), nn.LayerNorm(32), nn.Linear(32, 8)),
        lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 8)),
        convs,
    ],
)
def test_another_skeleton(saved: Path, other: Any) -> None:
    with pytest.raises(CheckpointError, match="made for another model"):
        load(other(), saved)


def test_an_interrupted_write_leaves_the_old_one(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, _ = load(dense(), saved)
    made, plan = small(dense(), torch.randn(3, 16))

    def interrupt(*_: Any, **_named: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(model_folder, "model_card", interrupt)  # the weights are on disk by then
    with pytest.raises(KeyboardInterrupt):
        save(made, plan, saved)
    assert {p.name for p in saved.parent.iterdir()} == {"out"}
    assert same_bits(load(dense(), saved)[0], old)
    with pytest.raises(KeyboardInterrupt):
        save(made, plan, saved.parent / "new")
    assert {p.name for p in saved.parent.iterdir()} == {"out"}


def test_an_earlier_checkpoint_is_replaced_and_other_files_stay(saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    (saved / "record.json").write_text("of the earlier model")
    made, plan = small(dense(), torch.randn(3, 16))
    save(made, plan, saved)
    assert same_bits(load(dense(), saved)[0], made)
    assert (saved / "notes.txt").read_text() == "mine"
    assert not (saved / "record.json").exists()


def test_a_kill_while_replacing_leaves_one_model_and_nothing_of_another(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(3, 16)
    results = [compress(dense(), x, f"macs={share}", runtime=Runtime(measure=False)) for share in (0.7, 0.5)]
    real, steps, seen = Path.replace, 0, set()

    def killed_after(steps: int) -> None:
        def replace(own: Path, target: Path) -> Path:
            nonlocal left
            left -= own.suffix != ".partial"  # those that are written before the folders are swapped
            if left < 0:
                raise KeyboardInterrupt  # for the rest of the save, as if there were none
            return real(own, target)

        left = steps
        monkeypatch.setattr(Path, "replace", replace)
        results[1].save(saved)

    for steps in range(20):
        monkeypatch.setattr(Path, "replace", real)
        results[0].save(saved)
        with suppress(KeyboardInterrupt):
            killed_after(steps)
        model, plan = load(dense(), saved)
        which = [result.plan == plan for result in results].index(True)
        assert same_bits(model, results[which].model)
        seen.add((which, len(list(saved.iterdir()))))
        if (saved / "plan.yaml").exists():
            assert Plan.load(saved / "plan.yaml") == plan
        assert read_record(saved) in (None, results[which].record)
        check_target(saved)
    assert seen >= {(0, 7), (0, 1), (1, 1), (1, 7)}


def test_an_error_while_replacing_leaves_all_as_it_was(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    real = Path.replace

    def replace(own: Path, target: Path) -> Path:
        if own.name == "model.safetensors":
            raise PermissionError
        return real(own, target)

    monkeypatch.setattr(Path, "replace", replace)
    made, plan = small(dense(), torch.randn(3, 16))
    with pytest.raises(CheckpointError, match="cannot write the checkpoint"):
        save(made, plan, saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_other_folders_are_not_touched(tmp_path: Path) -> None:
    made, plan = small(dense(), torch.randn(3, 16))
    (tmp_path / "model.safetensors").write_text("a model of somebody else's")
    with pytest.raises(CheckpointError, match="holds other files"):
        save(made, plan, tmp_path)
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(CheckpointError, match="is a file"):
            save(made, plan, path)
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty")
    check_target(tmp_path / "a" / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "model.safetensors"]


def test_plan_and_model_must_belong_together(tmp_path: Path) -> None:
    model, x = dense(), torch.randn(3, 16)
    made, plan = small(model, x)
    with pytest.raises(CheckpointError, match="the model does not"):
        save(model, plan, tmp_path / "out")
    kept = plan.replace(layers=tuple(layer.replace(action="keep") for layer in plan.layers))
    with pytest.raises(CheckpointError, match="the model does not"):  # load would build what the model does not have
        save(model, kept, tmp_path / "out")
    nothing = plan.replace(layers=())
    with pytest.raises(CheckpointError, match="does not know"):
        save(made, nothing, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_one_layer(tmp_path: Path) -> None:
    made, plan = small(nn.Linear(16, 16), torch.randn(3, 16))
    loaded, _ = load(nn.Linear(16, 16), save(made, plan, tmp_path / "out"))
    assert same_bits(made, loaded)


def test_a_load_during_saves_is_the_earlier_model_or_the_later(saved: Path) -> None:
    first = load(dense(), saved)[0]
    code = (
        "import sys, torch, tenfold\nfrom tests.checkpoint.test_model_folder import dense, small\n"
        "from tenfold.checkpoint import save\n"
        "made, plan = small(dense(), torch.randn(3, 16))\n"
        "print('ready', flush=True)\n"
        "for i in range(60):\n"
        "    for p in made.parameters(): p.data.fill_(i)\n"
        "    save(made, plan, sys.argv[1])\n"
    )
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    writer = subprocess.Popen([sys.executable, "-c", code, str(saved)], env=environ, stdout=subprocess.PIPE)
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"ready\n"
    seen = set()
    while writer.poll() is None:
        found = load(dense(), saved)[0]
        if not same_bits(found, first):
            (value,) = {float(x) for p in found.parameters() for x in p.detach().flatten()}  # all tensors of one save
            seen.add(value)
    assert writer.returncode == 0
    assert len(seen) > 1
    assert {p.name for p in saved.parent.iterdir()} == {"out"}


@pytest.mark.parametrize("name", ["record.json", "options.json", "analysis.json"])
def test_one_changed_bit_beside_the_model(name: str, tmp_path: Path) -> None:
    result = compress(dense(), torch.randn(3, 16), "macs=0.7", runtime=Runtime(measure=False))
    path = result.save(tmp_path / "out")
    read = {
        "record.json": read_record,
        "options.json": lambda folder: OptionTable.load(folder / name),
        "analysis.json": read_run,
    }[name]
    read(path)
    text = (path / name).read_text()
    place = text.index("0.", 200)
    (path / name).write_text(f"{text[:place]}1{text[place + 1 :]}")
    with pytest.raises(TenfoldError, match=rf"{name} was changed after it was written"):
        read(path)


def test_the_working_folder_itself_is_a_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, plan = small(dense(), torch.randn(3, 16))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save(made, plan, ".")
    assert same_bits(load(dense(), ".")[0], made)
    assert {p.name for p in tmp_path.iterdir()} == {"here"}
