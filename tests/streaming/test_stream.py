"""What is compressed block by block is what the whole would have become, and survives being killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import tenfold
from tenfold import Recipe, Runtime
from tenfold.checkpoint.shards import INDEX, WeightFiles
from tenfold.errors import CheckpointError, DataError, FileError, PlanError, RecipeError, TenfoldError
from tenfold.streaming import compress_streamed, open_offloaded

WIDTH, QUIET = 24, Runtime(measure=False)


class Block(nn.Module):
    """A residual MLP that returns a tuple, as blocks of transformers may."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, *, scale: Tensor) -> tuple[Tensor]:
        return (x + scale * self.down(torch.nn.functional.gelu(self.up(self.norm(x)))),)


class Net(nn.Module):
    """Words in, scores of words out."""

    def __init__(self, depth: int = 3, words: int = 40) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(words, WIDTH), nn.Linear(WIDTH, words)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, ids: Tensor) -> Tensor:
        x, scale = self.embed(ids), torch.ones((), device=ids.device)
        for block in self.blocks:
            (x,) = block(x, scale=scale)
        return self.head(x)


def stored(folder: Path, model: nn.Module) -> Path:
    """Write the weights of a model in two shards with an index."""
    folder.mkdir()
    state = model.state_dict()
    names = sorted(state)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in shards.items():
        save_file({name: state[name] for name in own}, folder / file)
    placed = {name: file for file, own in shards.items() for name in own}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return folder


def given(folder: Path) -> tuple[nn.Module, Path, list[Tensor], nn.Module]:
    """Return a model, the folder of its weights, data, and the model without weights."""
    torch.manual_seed(0)
    model = Net().eval()
    data = list(torch.randint(0, 40, (24, 2, 12)))
    return model, stored(folder / "dense", model), data, Net().to("meta")


@pytest.mark.parametrize(
    "calibration", [{}, {"loss": "fisher"}, {"max_width": 32}], ids=["outputs", "fisher", "sketched"]
)
def test_equal_to_the_whole(tmp_path: Path, calibration: dict[str, Any]) -> None:
    model, weights, data, empty = given(tmp_path)
    recipe = Recipe.of({"budget": "params=0.6", "keep": "blocks.1.up", "calibration": calibration})
    whole = tenfold.compress(model, data[0], recipe, data=data, runtime=QUIET)
    found = compress_streamed(weights, tmp_path / "out", recipe, data=data, skeleton=empty, example_inputs=data[0])
    assert [(layer.path, layer.format, layer.rank, layer.reason) for layer in found.plan.layers] == [
        (layer.path, layer.format, layer.rank, layer.reason) for layer in whole.plan.layers
    ]
    assert [(unit.pivot, unit.size) for unit in found.plan.units] == [
        (unit.pivot, unit.size) for unit in whole.plan.units
    ]
    assert found.plan.after == whole.plan.after
    assert found.record.agreement is not None
    assert whole.record.agreement is not None
    assert found.record.agreement.relative_error == pytest.approx(whole.record.agreement.relative_error, rel=1e-3)
    loaded, plan = tenfold.load(Net(), found.path)
    assert plan.after == whole.plan.after
    torch.testing.assert_close(loaded.eval()(data[0]), whole.model(data[0]), rtol=1e-4, atol=1e-4)
    part_by_part = open_offloaded(found.path, data[0], skeleton=Net().to("meta"))
    assert torch.equal(part_by_part(data[0]), loaded(data[0]))
    assert not (tmp_path / ".out.streaming").exists()


def test_without_data(tmp_path: Path) -> None:
    model, weights, data, empty = given(tmp_path)
    whole = tenfold.compress(model, data[0], "params=0.6", runtime=QUIET)
    recipe = {"budget": "params=0.6", "calibration": {"method": "none"}}
    found = compress_streamed(weights, tmp_path / "out", recipe, data=data, skeleton=empty, example_inputs=data[0])
    assert [layer.rank for layer in found.plan.layers] == [layer.rank for layer in whole.plan.layers]
    assert found.record.after.bytes == sum(t.numel() * t.element_size() for t in whole.model.state_dict().values())
    assert torch.equal(tenfold.load(Net(), found.path)[0](data[0]), whole.model(data[0]))


def test_a_layer_that_is_not_used_stays(tmp_path: Path) -> None:
    class Wasteful(Block):
        def forward(self, x: Tensor, *, scale: Tensor) -> tuple[Tensor]:
            self.up(x.detach())  # thrown away
            return (x + scale * self.down(torch.cat([x, x], -1)),)

    def wasteful() -> Net:
        net = Net()
        net.blocks[1] = Wasteful()
        return net

    torch.manual_seed(0)
    model, data = wasteful().eval(), list(torch.randint(0, 40, (24, 2, 12)))
    weights, empty = stored(tmp_path / "dense", model), wasteful().to("meta")
    found = compress_streamed(weights, tmp_path / "out", "params=0.6", data=data, skeleton=empty, blocks=["blocks.*"])
    assert found.plan.layer("blocks.1.up").action == "keep"
    assert found.plan.layer("blocks.2.up").action == "factorize" or found.plan.narrowed


def test_killed_anywhere_and_given_again(tmp_path: Path) -> None:
    _, weights, data, empty = given(tmp_path)

    def run(out: Path, runtime: Runtime) -> Any:
        return compress_streamed(
            weights, out, "params=0.6", data=data, skeleton=empty, example_inputs=data[0], runtime=runtime
        )

    wanted = run(tmp_path / "at_once", Runtime())
    assert wanted.needs.max_cache == 16 << 20  # a runtime that says nothing of it takes what is usual here
    left = [1]

    def end(event: Any) -> None:
        left[0] -= event.done is not None
        if left[0] < 0:
            raise KeyboardInterrupt

    folder, out, steps = tmp_path / "work", tmp_path / "bit_by_bit", 0
    while not out.exists():
        left[0] = 2 * steps  # a part that is done is counted again
        steps += 1
        try:
            run(out, Runtime(folder=folder, on_event=end))
        except KeyboardInterrupt:
            assert not out.exists()
        assert steps < 20
    assert steps > 3
    for file in wanted.path.glob("*.safetensors"):
        assert file.read_bytes() == (out / file.name).read_bytes()
    with pytest.raises(FileError, match="holds another run"):
        compress_streamed(
            weights, tmp_path / "x", "params=0.7", data=data, skeleton=empty, runtime=Runtime(folder=folder)
        )


def test_bad_weights_are_refused_before_work(tmp_path: Path) -> None:
    _, weights, data, empty = given(tmp_path)

    def refused(match: str, **changes: Any) -> None:
        options: dict[str, Any] = {"data": data, "skeleton": empty} | changes
        with pytest.raises(TenfoldError, match=match):
            compress_streamed(weights, tmp_path / "out", options.pop("recipe", "params=0.6"), **options)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / ".out.streaming").exists()

    refused("pass 16 or more|too few to hold some out", data=data[:6])
    refused("needs the whole model at once", recipe={"budget": "latency=0.5"})
    refused("needs the whole model at once", recipe={"budget": "params=0.5", "calibration": {"refine": 3}})
    refused("does not hold|is of another model", skeleton=Net(words=41).to("meta"))
    refused("does not hold 'blocks.3", skeleton=Net(depth=4).to("meta"))
    refused("no chain|cannot be gone through block by block", skeleton=nn.Sequential(nn.Embedding(40, 4)).to("meta"))
    refused("config.json", skeleton=None)
    whole = (weights / "a.safetensors").read_bytes()
    (weights / "a.safetensors").write_bytes(whole[: len(whole) // 2])
    refused("truncated, damaged")
    (weights / "a.safetensors").unlink()
    refused("lacks a.safetensors")
    index = json.loads((weights / INDEX).read_text())
    (weights / "a.safetensors").write_bytes(whole)
    index["weight_map"]["made.up"] = "a.safetensors"
    (weights / INDEX).write_text(json.dumps(index))
    refused("says that a.safetensors holds 'made.up'")
    with pytest.raises(CheckpointError, match="there is no folder"):
        WeightFiles.of(tmp_path / "nowhere")


def test_a_changed_shard_is_noticed(tmp_path: Path) -> None:
    _, weights, data, empty = given(tmp_path)
    found = compress_streamed(weights, tmp_path / "out", "params=0.6", skeleton=empty, example_inputs=data[0])
    shard = max(found.path.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match="changed after it was written"):
        tenfold.load(Net(), found.path)


def test_what_is_between_blocks_breaks_the_chain(tmp_path: Path) -> None:
    class Broken(Net):
        def forward(self, ids: Tensor) -> Tensor:
            x, scale = self.embed(ids), torch.ones((), device=ids.device)
            for block in self.blocks:
                x = block(x, scale=scale)[0] * 1.5
            return self.head(x)

    weights = stored(tmp_path / "dense", Net())
    with pytest.raises(PlanError, match="is not what the block before puts out"):
        compress_streamed(
            weights,
            tmp_path / "out",
            "params=0.6",
            skeleton=Broken().to("meta"),
            example_inputs=torch.zeros(1, 4, dtype=torch.long),
        )
    with pytest.raises(DataError, match="example_inputs"):
        compress_streamed(weights, tmp_path / "out", "params=0.6", skeleton=Net().to("meta"))
    with pytest.raises(RecipeError):
        compress_streamed(weights, tmp_path / "out", {"nothing": 1}, skeleton=Net().to("meta"))
