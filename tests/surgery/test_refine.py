"""Blocks refined without labels: nearer to the original, never further, the same bits again, nothing else touched."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tenfold import Runtime, compress
from tenfold.calibration.block_gradients import block_roots
from tenfold.errors import CalibrationWarning, CheckpointError, DataError, TenfoldError
from tenfold.records import Recipe
from tenfold.surgery import Refinement, refine_blocks_
from tenfold.tensors import digest
from tenfold.tracing import copied
from tenfold.tracing.block_calls import repeated_blocks
from tenfold.tracing.replay import Replay

Made = tuple["Net", nn.Module, list[Tensor]]
RECIPE = {"budget": "params=0.5", "formats": "low_rank", "keep": ["stem", "head"]}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(48, 16)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> tuple[Tensor]:
        branch = self.down(nn.functional.gelu(self.up(self.norm(x))))
        return (x + (branch if scale is None else branch * scale),)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = (
            nn.Linear(10, 16),
            nn.ModuleList(Block() for _ in range(3)),
            nn.Linear(16, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            (x,) = block(x, scale=torch.full((16,), 2.0))
        scores: Tensor = self.head(x)
        return scores


@pytest.fixture(scope="module")
def compressed() -> Made:
    torch.manual_seed(0)
    model = Net().eval()
    batches = [torch.randn(128, 10) for _ in range(10)]
    return model, compress(model, batches[0], RECIPE, data=batches, runtime=Runtime(measure=False)).model, batches


@pytest.fixture
def made(compressed: Made) -> Made:
    model, small, batches = compressed
    return copied(model), copied(small), batches


def missed(model: nn.Module, small: nn.Module) -> float:
    x = torch.randn(200, 10, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return float((model(x) - small(x)).square().sum())


def test_blocks_come_nearer_to_the_original_on_samples_that_nobody_saw(
    made: Made,
) -> None:
    model, small, batches = made
    outside = digest({k: v for k, v in small.state_dict().items() if not k.startswith("blocks.")})
    original, before = digest(model.state_dict()), missed(model, small)
    refined = refine_blocks_(small, model, batches, Refinement(steps=60, rate=1e-3))
    assert [block.path for block in refined] == ["blocks.0", "blocks.1", "blocks.2"]
    assert all(block.kept and block.after < block.before for block in refined)
    assert missed(model, small) < 0.7 * before
    assert digest(model.state_dict()) == original
    assert digest({k: v for k, v in small.state_dict().items() if not k.startswith("blocks.")}) == outside
    assert not any(p.grad is not None for p in small.parameters())


def test_errors_are_those_of_a_block_beside_the_original(made: Made) -> None:
    model, small, batches = made
    model.head.weight.data.copy_(torch.eye(16)[:5])  # so that the last block counts by its first five outputs
    entering: dict[str, Tensor] = {}
    small.get_submodule("blocks.2").register_forward_pre_hook(lambda _, args: entering.update(x=args[0]))
    (*_, last) = refine_blocks_(small, model, batches, Refinement(steps=1, rate=0.0))
    assert not last.kept
    held, scale = torch.cat([batches[i] for i in (2, 7)]), torch.full((16,), 2.0)  # a fifth, evenly spread
    with torch.no_grad():
        small(held)
        found = small.get_submodule("blocks.2")(entering["x"], scale=scale)[0][:, :5]
        wanted = model.stem(held)
        for block in model.blocks:
            (wanted,) = block(wanted, scale=scale)
        missed = float((found - wanted[:, :5]).square().sum() / wanted[:, :5].square().sum())
    assert last.before == pytest.approx(missed, rel=0.05)


def test_what_does_not_help_is_taken_back(made: Made) -> None:
    model, small, batches = made
    before = digest(small.state_dict())
    refined = refine_blocks_(small, model, batches, Refinement(steps=5, rate=10.0))
    assert not any(block.kept for block in refined)
    assert digest(small.state_dict()) == before


def test_the_same_seed_gives_the_same_bits(made: Made) -> None:
    model, small, batches = made
    twins = [copied(small) for _ in range(3)]
    for twin, seed in zip(twins, (0, 0, 1), strict=True):
        refine_blocks_(twin, model, batches, Refinement(steps=12, rate=1e-3, seed=seed))
    first, again, other = (digest(twin.state_dict()) for twin in twins)
    assert first == again != other


class Killed(BaseException):
    """As a signal would end it."""


def test_a_killed_refinement_goes_on_after_the_last_block_to_the_same_bits(made: Made, tmp_path: Path) -> None:
    model, small, batches = made
    whole, first, again = (copied(small) for _ in range(3))
    config = Refinement(steps=6, rate=1e-3)
    expected = refine_blocks_(whole, model, batches, config)

    def die(done: int, _total: int) -> None:
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        refine_blocks_(first, model, batches, config, folder=tmp_path, progress=die)
    assert len(list(tmp_path.iterdir())) == 2
    steps = trained_blocks(again)
    assert refine_blocks_(again, model, batches, config, folder=tmp_path) == expected
    assert steps == {"blocks.2"}
    assert digest(again.state_dict()) == digest(whole.state_dict())
    other = copied(small)
    refine_blocks_(other, model, batches, Refinement(steps=5, rate=1e-3), folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 6  # another call begins on its own


def trained_blocks(model: nn.Module) -> set[str]:
    """Return a set that fills with the blocks whose parameters get gradients."""
    found: set[str] = set()
    for name, parameter in model.named_parameters():
        path = ".".join(name.split(".")[:2])
        parameter.register_post_accumulate_grad_hook(lambda _, path=path: found.add(path))
    return found


def test_a_damaged_block_is_refused(made: Made, tmp_path: Path) -> None:
    model, small, batches = made
    refine_blocks_(copied(small), model, batches, Refinement(steps=1), folder=tmp_path)
    file = min(tmp_path.iterdir())
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=r"changed after it was written.*its block is refined again"):
        refine_blocks_(small, model, batches, Refinement(steps=1), folder=tmp_path)


def test_the_dense_model_runs_once_for_all_steps(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    model, small, batches = made
    dense = {id(block) for block in model.blocks}
    forward, runs = Block.forward, Counter[bool]()

    def counted(self: Block, x: Tensor, scale: Tensor | None = None) -> tuple[Tensor]:
        runs[id(self) in dense] += 1
        return forward(self, x, scale)

    monkeypatch.setattr(Block, "forward", counted)
    seen = []
    for steps in (8, 80):  # all of eight batches once, and ten times
        runs.clear()
        refine_blocks_(copied(small), model, batches, Refinement(steps=steps))
        seen.append((runs[True], runs[False]))
    (dense_once, few), (dense_often, many) = seen
    assert dense_once == dense_often
    assert many - few == 3 * (80 - 8)  # a forward for each step, none to find out what enters


@pytest.fixture
def only_new_objects() -> Iterator[None]:
    """Leave what is there already out of ``gc.get_objects``."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("only_new_objects")
def test_what_is_held_is_of_one_block_however_many_there_are(made: Made) -> None:
    _, _, batches = made
    torch.manual_seed(0)
    peaks = []
    for count in (3, 9):
        model = nn.Sequential(nn.Linear(10, 16), nn.Sequential(*(Plain() for _ in range(count))), nn.Linear(16, 5))
        recipe = {**RECIPE, "keep": ["0", "2"]}
        small = compress(model.eval(), batches[0], recipe, runtime=Runtime(measure=False)).model
        alive = [held()]
        refine_blocks_(small, model, batches, Refinement(steps=8), progress=lambda *_, a=alive: a.append(held()))
        assert len(alive) == 1 + count
        peaks.append(max(alive) - alive[0])
    one = 10 * 128 * 16 * 4  # what enters a block, of all batches
    assert peaks[0] <= 5 * one
    assert peaks[1] <= peaks[0]


class Plain(Block):
    """The same, with a tensor for an output."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = super().forward(x)
        return x


def held() -> int:
    """Return the bytes of all activations that are alive."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) is Tensor and t.dim() == 2 and len(t) == 128]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_what_there_is_no_room_for_is_computed_again_with_the_same_bits(made: Made) -> None:
    model, small, batches = made
    twins = [copied(small) for _ in range(3)]
    for twin, room in zip(twins, (4 << 30, 0, 3 * 128 * 16 * 4), strict=True):
        refine_blocks_(twin, model, batches, Refinement(steps=12, rate=1e-3, max_cache=room))
    assert len({digest(twin.state_dict()) for twin in twins}) == 1


def test_a_head_of_very_many_outputs_does_not_run_for_what_errors_cost() -> None:
    torch.manual_seed(0)
    model = Net()
    model.head = nn.Linear(16, 4000)
    with torch.no_grad():
        model.head.weight.mul_(torch.logspace(0, -2, 16))  # outputs feel some directions far more
    batches, paths = [torch.randn(512, 10) for _ in range(8)], ["blocks.0", "blocks.2"]
    runs: list[int] = []

    class Counted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            runs.append(len(x))
            return super().forward(x)

    fast = block_roots(model.eval(), paths, batches)
    model.head.__class__ = Counted  # of another forward, nobody can be sure what it does
    whole = block_roots(model, paths, batches)
    assert len(runs) == 8
    for path in paths:
        one, other = (root[path] @ root[path].mT for root in (fast, whole))
        assert torch.linalg.norm(one - other) < 0.1 * torch.linalg.norm(other)


class Looking(Net):
    """Its forward looks at its inputs, so that each batch may go another way."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if bool((x < 100).all()) else x / 100)


def test_a_head_of_very_many_outputs_runs_no_oftener_for_more_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, runs, forward = Looking(), [], nn.Linear.forward
    model.head = nn.Linear(16, 4000)
    batches = [torch.randn(64, 10) for _ in range(20)]
    recipe = {"rule": {"name": "ratio", "share": 0.5}, "formats": "low_rank", "keep": ["stem", "head"]}
    small = compress(model.eval(), batches[0], recipe, runtime=Runtime(measure=False)).model

    def counted(self: nn.Linear, x: Tensor) -> Tensor:
        runs.append(self.out_features == 4000)
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    seen = []
    for count in (10, 20):
        runs.clear()
        assert len(refine_blocks_(copied(small), model, batches[:count], Refinement(steps=20))) == 3
        seen.append(sum(runs))
    assert seen[0] == seen[1]


def test_flags_of_parameters_and_modes_stay(made: Made) -> None:
    model, small, batches = made
    small.requires_grad_(requires_grad=False)
    small.train()
    refine_blocks_(small, model, batches, Refinement(steps=2))
    assert not any(p.requires_grad for p in small.parameters())
    assert all(module.training for module in small.modules())


def test_compress_refines_where_the_recipe_says_so(made: Made) -> None:
    model, small, batches = made
    wanted = {**RECIPE, "calibration": {"refine": 60}}
    result = compress(model, batches[0], wanted, data=batches, runtime=Runtime(measure=False))
    assert missed(model, result.model) < missed(model, small)
    with pytest.raises(DataError, match="refine, which needs data"):
        compress(model, batches[0], wanted, runtime=Runtime(measure=False))
    with pytest.raises(TenfoldError, match="refine needs data"):
        Recipe.of({"calibration": {"refine": 5, "method": "none"}})


def test_models_without_blocks_say_so() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval()
    batches = [torch.randn(32, 16) for _ in range(4)]
    wanted = {"budget": "params=0.6", "formats": "low_rank", "calibration": {"refine": 5}}
    with pytest.warns(CalibrationWarning, match="no repeated blocks"):
        compress(model, batches[0], wanted, data=batches, runtime=Runtime(measure=False))


class Twice(nn.Module):
    """The first block runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for index in (2, 0, 1, 0):
            (x,) = self.blocks[index](x)
        return x


def test_blocks_are_in_the_order_of_the_forward_and_run_once() -> None:
    assert repeated_blocks(Twice(), torch.ones(2, 16)) == ("blocks.2", "blocks.1")


def test_a_call_is_what_the_block_was_given() -> None:
    torch.manual_seed(0)
    model, batches = Net().eval(), [torch.randn(4, 10), torch.randn(4, 10)]
    replay = Replay(model, batches)
    calls = [*replay.calls("blocks.1"), *replay.calls("blocks.1", 0)]
    with torch.no_grad():
        for call, x in zip(calls, [*batches, batches[0]], strict=True):
            assert list(call.kwargs) == ["scale"]
            torch.testing.assert_close(call.args[0], model.blocks[0](model.stem(x), **call.kwargs)[0])
        torch.testing.assert_close(calls[2].run(model.blocks[1]), next(replay.outputs("blocks.1", 0)))
