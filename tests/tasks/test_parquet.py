from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tenfold.errors import DataError
from tenfold.tasks import load_task
from tenfold.tasks.cifar10 import Cifar10

Write = Callable[..., Path]


def _pixels(count: int, seed: int = 0, size: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def _expected(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def _decoded(home: Path) -> list[Path]:
    return sorted((home / ".cache" / "tenfold" / "decoded").glob("*"))


def test_shards_are_read_in_order(tmp_path: Path, home: Path, write_shard: Write) -> None:
    images = _pixels(30)
    for i in range(3):
        part = slice(10 * i, 10 * i + 10)
        write_shard(
            tmp_path / f"d/cifar10/train-0000{i}-of-00003.parquet", images[part], [(i + j) % 10 for j in range(10)]
        )
    held = Cifar10(data=tmp_path / "d").read("train")
    assert torch.equal(held.inputs, _expected(images))
    assert held.labels.tolist() == [(i + j) % 10 for i in range(3) for j in range(10)]


@pytest.mark.parametrize("place", ["test-a.parquet", "cifar10/test-a.parquet", "cifar10/plain_text/test-a.parquet"])
@pytest.mark.parametrize(("column", "struct"), [("img", True), ("image", True), ("image", False)])
def test_layouts(tmp_path: Path, home: Path, write_shard: Write, place: str, column: str, struct: bool) -> None:
    images = _pixels(3)
    write_shard(tmp_path / "d" / place, images, [0, 9, 3], column, struct)
    held = Cifar10(data=tmp_path / "d").test_set
    assert torch.equal(held.inputs, _expected(images))
    assert held.labels.tolist() == [0, 9, 3]


def test_places_in_order_of_precedence(
    tmp_path: Path, home: Path, write_shard: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(home / ".cache/tenfold/datasets/cifar10/test-a.parquet", _pixels(1, 0), [0])
    write_shard(tmp_path / "env/cifar10/test-a.parquet", _pixels(1, 1), [1])
    write_shard(tmp_path / "arg/cifar10/test-a.parquet", _pixels(1, 2), [2])
    assert Cifar10().test_set.labels.tolist() == [0]
    monkeypatch.setenv("TENFOLD_DATA", str(tmp_path / "env"))
    assert Cifar10().test_set.labels.tolist() == [1]
    assert Cifar10(data=tmp_path / "arg").test_set.labels.tolist() == [2]
    with pytest.raises(DataError, match="is not a folder"):  # what was asked for is never replaced by something else
        Cifar10(data=tmp_path / "nowhere").test_set  # noqa: B018


def test_nothing_there_says_where_it_looked_and_what_to_do(tmp_path: Path, home: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_task("cifar10", data=tmp_path).evaluate(torch.nn.Identity())
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "--data" in message
    assert "TENFOLD_DATA" in message
    assert "uoft-cs/cifar10" in message
    assert "\n" not in message


def test_missing_shard_is_named(tmp_path: Path, home: Path, write_shard: Write) -> None:
    write_shard(tmp_path / "train-00000-of-00002.parquet", _pixels(1), [0])
    with pytest.raises(DataError, match="shard 1 is missing"):
        Cifar10(data=tmp_path).train_set  # noqa: B018
    write_shard(tmp_path / "train-00001-of-00002.parquet", _pixels(1), [0])
    write_shard(tmp_path / "train-00000-of-00001.parquet", _pixels(1), [0])
    with pytest.raises(DataError, match="several series"):
        Cifar10(data=tmp_path).train_set  # noqa: B018


def test_broken_data_gives_one_line(tmp_path: Path, home: Path, write_shard: Write) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = write_shard(tmp_path / "test-a.parquet", _pixels(5), [0] * 5)
    whole = path.read_bytes()

    def refused(match: str) -> None:
        with pytest.raises(DataError, match=match) as caught:
            Cifar10(data=tmp_path).test_set  # noqa: B018
        assert "\n" not in str(caught.value)

    path.write_bytes(whole[: len(whole) // 2])
    refused("not a readable Parquet file")
    path.write_bytes(b"")
    refused("not a readable Parquet file")
    pq.write_table(pa.table({"text": ["a"], "label": [0]}), path)
    refused("has the columns text, label; need label and one of img, image")
    pq.write_table(pa.table({"img": pa.array([b"no picture"]), "label": [0]}), path)
    refused("row 0 is not a readable picture")
    pq.write_table(pa.table({"img": pa.array([None], pa.binary()), "label": [0]}), path)
    refused("without the bytes of a picture")
    write_shard(path, _pixels(0), [])
    refused("hold no rows")
    write_shard(path, _pixels(2, size=28), [0, 1])
    refused("28×28 pixels; need 32×32")
    write_shard(path, _pixels(2), [0, 10])
    refused(r"labels 0\.\.10; cifar10 needs .* labels 0\.\.9")
    path.write_bytes(whole)
    assert len(Cifar10(data=tmp_path).test_set) == 5


def test_decoding_happens_once_until_the_contents_change(
    tmp_path: Path, home: Path, write_shard: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_shard(tmp_path / "a/test-a.parquet", _pixels(4, 0), [1, 2, 3, 4])
    first = Cifar10(data=tmp_path / "a").test_set
    assert len(_decoded(home)) == 1
    monkeypatch.setattr("tenfold.tasks.parquet._decode", lambda *a: pytest.fail("decoded again"))
    again = Cifar10(data=tmp_path / "a").test_set
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(first.labels, again.labels)
    path.rename(tmp_path / "test-a.parquet")  # the same contents elsewhere
    assert torch.equal(Cifar10(data=tmp_path).test_set.inputs, first.inputs)
    monkeypatch.undo()
    monkeypatch.setenv("HOME", str(home))
    write_shard(tmp_path / "test-a.parquet", _pixels(4, 1), [1, 2, 3, 4])  # the same name, other contents
    assert torch.equal(Cifar10(data=tmp_path).test_set.inputs, _expected(_pixels(4, 1)))


def test_damaged_or_unwritable_cache_only_costs_time(
    tmp_path: Path, home: Path, write_shard: Write, caplog: pytest.LogCaptureFixture
) -> None:
    images = _pixels(2)
    write_shard(tmp_path / "test-a.parquet", images, [0, 1])
    assert len(Cifar10(data=tmp_path).test_set) == 2
    (kept,) = _decoded(home)
    kept.write_bytes(kept.read_bytes()[:100])
    assert torch.equal(Cifar10(data=tmp_path).test_set.inputs, _expected(images))
    assert "decoding again" in caplog.text
    kept.unlink()
    kept.parent.rmdir()
    kept.parent.write_text("a file where the folder should be")
    assert torch.equal(Cifar10(data=tmp_path).test_set.inputs, _expected(images))
    assert "cannot keep decoded pictures" in caplog.text
