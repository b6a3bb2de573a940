"""What a streamed run takes is arithmetic, which has laws; and what is not there is not started."""

from __future__ import annotations

import logging
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tenfold import Recipe, Runtime
from tenfold.errors import FileError, RecipeError
from tenfold.streaming import Needs, compress_streamed
from tenfold.streaming.bounds import within
from tenfold.streaming.estimate import Estimate
from tenfold.streaming.stream import looked_at
from tests.language import folder, small_llama
from tests.streaming.test_stream import Net, given, stored

START = 300 << 20


def estimated(folder: Path, *, depth: int = 3, samples: int = 24, rows: int = 2) -> Estimate:
    torch.manual_seed(0)
    dense = folder / f"dense-{depth}"
    if not dense.exists():
        stored(dense, Net(depth))
    data: list[Tensor] = list(torch.randint(0, 40, (samples, rows, 12)))
    recipe = Recipe.of({"budget": "params=0.6", "keep_ends": False})
    return Estimate.of(looked_at(dense, folder / "out", recipe, data=data, skeleton=Net(depth).to("meta")))


def test_memory_depends_on_batches_and_blocks_and_the_disk_on_all_of_them(tmp_path: Path) -> None:
    cases: list[dict[str, int]] = [{}, {"depth": 6}, {"depth": 9}, {"samples": 48}, {"samples": 96}, {"rows": 8}]
    estimates = [estimated(tmp_path, **case) for case in cases]
    base, *deeper_or_more, larger = (own.needs(1 << 20, None, START) for own in estimates)
    assert {own.memory for own in deeper_or_more} == {base.memory}
    assert larger.memory > base.memory
    made, more = (estimates[i].passing.made["blocks.1"] for i in (0, -1))
    assert 3.3 * made < more <= 4 * made  # norms hold something for each of their weights besides
    six, nine, twice, four_times = (own.disk for own in deeper_or_more)
    assert nine - six == pytest.approx(six - base.disk, rel=0.01)
    assert four_times - twice == pytest.approx(2 * (twice - base.disk), rel=0.01)


def test_layers_with_one_input_have_one_second_moment_of_it(tmp_path: Path) -> None:
    folder(tmp_path / "model", small_llama())
    data = [{"input_ids": ids} for ids in torch.randint(0, 40, (24, 1, 12))]
    estimate = Estimate.of(looked_at(tmp_path / "model", tmp_path / "out", Recipe.of("params=0.6"), data=data))
    own = "model.layers.1"
    assert {path: first for path, first in estimate.passing.shared.items() if path.startswith(own)} == {
        f"{own}.self_attn.k_proj": f"{own}.self_attn.q_proj",
        f"{own}.self_attn.v_proj": f"{own}.self_attn.q_proj",
        f"{own}.mlp.up_proj": f"{own}.mlp.gate_proj",
    }


def test_what_is_allowed_is_kept_by_a_smaller_cache_then_by_sketches(tmp_path: Path) -> None:
    estimate = estimated(tmp_path)
    network, cache = estimate.network, 64 << 20
    free = within(network, cache, None)
    assert (free.max_cache, free.max_width) == (cache, None)
    less = within(network, cache, free.memory - (48 << 20))
    assert less.max_cache < cache
    assert less.max_width is None
    assert less.memory <= free.memory - (48 << 20) + (8 << 20)  # the process itself may have grown meanwhile
    with pytest.raises(RecipeError, match="the least that this takes is"):
        within(network, cache, 100 << 20)


def test_wide_inputs_are_sketched_for_it_and_a_run_goes_on_as_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, weights, data, empty = given(tmp_path)
    monkeypatch.setattr("tenfold.streaming.bounds.NARROWEST", 8)
    monkeypatch.setattr("tenfold.streaming.bounds.resident", lambda: START)
    limit = estimated(tmp_path).needs(0, 24, START).memory
    assert limit < estimated(tmp_path).needs(0, None, START).memory
    runtime = Runtime(max_memory=limit, folder=tmp_path / "work")
    with caplog.at_level(logging.INFO, logger="tenfold"):
        found = compress_streamed(weights, tmp_path / "out", "params=0.6", data=data, skeleton=empty, runtime=runtime)
    assert isinstance(found.needs, Needs)
    assert found.needs.max_width == found.plan.recipe.calibration.max_width == 24
    assert found.needs.memory <= limit
    assert found.record.settings["memory_bytes"] == found.needs.memory
    text = caplog.text
    assert "streaming takes up to" in text
    assert "are sketched, to stay within the memory that is allowed" in text
    assert "blocks." in found.needs.in_words()
    monkeypatch.setattr("tenfold.streaming.bounds.resident", lambda: START - (1 << 30))  # more would fit now
    again = compress_streamed(weights, tmp_path / "again", "params=0.6", data=data, skeleton=empty, runtime=runtime)
    for file in found.path.glob("model*"):
        assert file.read_bytes() == (again.path / file.name).read_bytes()


def test_too_little_memory_or_disk_is_said_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, weights, data, empty = given(tmp_path)

    def left() -> set[str]:
        return {path.name for path in tmp_path.iterdir()}

    before = left()
    with pytest.raises(RecipeError, match=r"max_memory is 1\.0 MiB, and the least"):
        compress_streamed(
            weights, tmp_path / "o", "params=0.6", data=data, skeleton=empty, runtime=Runtime(max_memory="1MiB")
        )
    with pytest.raises(RecipeError, match="cannot read the size"):
        Runtime(max_memory="plenty")
    usage = namedtuple("usage", "free")  # noqa: PYI024 - what shutil returns has no types either
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 10))
    with pytest.raises(FileError, match=r"take up to .* MiB, and 0.0 MiB are free there"):
        compress_streamed(weights, tmp_path / "o", "params=0.6", data=data, skeleton=empty)
    assert left() == before
