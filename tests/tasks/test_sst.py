from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tenfold.errors import CheckpointError, DataError, UnknownNameError
from tenfold.layers import TTEmbedding
from tenfold.tasks import load_task
from tenfold.tasks.sentences import PADDING, UNKNOWN, Sentences, vocabulary
from tenfold.tasks.sst import RANK, TRAINS, WORDS, Sst

TRAIN = "4 a good good film\n0 a bad film .\n2 fine\n1 not good .\n"
DEV = "3 good enough\n0 bad\n"
TEST = "4 a very good one\n1 bad\n0 bad bad\n"


@pytest.fixture
def folder(home: Path) -> Path:
    """The default place, with tiny files in it."""
    where = home / ".cache" / "tenfold" / "datasets" / "sst"
    where.mkdir(parents=True)
    for split, text in (("train", TRAIN), ("dev", DEV), ("test", TEST)):
        (where / f"stsa.fine.{split}").write_text(text, encoding="utf-8")
    return where


def test_sentences_become_ids_of_the_training_part(folder: Path) -> None:
    task = Sst()
    # By how often they are there, then by the alphabet.
    assert list(task.ids) == ["good", ".", "a", "film", "bad", "fine", "not"]
    assert task.test_set.inputs.tolist() == [[4, UNKNOWN, 2, UNKNOWN], [6, 0, 0, 0], [6, 6, 0, 0]]
    assert task.test_set.labels.tolist() == [4, 1, 0]
    assert len(task.train_set) == 6


def test_the_validation_part_is_the_sets_own(folder: Path) -> None:
    task = Sst(data=folder)
    ((ids, labels),) = task.validation_batches(batch_size=10)
    assert labels.tolist() == [3, 0]
    assert ids.tolist() == [[2, UNKNOWN], [6, PADDING]]
    held = [label for _, some in task.train_batches(0, batch_size=2, seed=0, hold_out=True) for label in some.tolist()]
    assert sorted(held) == [0, 1, 2, 4]
    assert sum(len(y) for _, y in task.train_batches(0, batch_size=2, seed=0)) == 6
    assert sum(len(x) for x in task.calibration_batches(4, batch_size=3, seed=0)) == 4


def test_batches_end_with_their_longest_sentence(folder: Path) -> None:
    batches = list(Sst(data=folder.parent).test_batches(batch_size=1))
    assert [tuple(ids.shape) for ids, _ in batches] == [(1, 4), (1, 1), (1, 2)]


def test_training_loses_words_and_no_others() -> None:
    ids = torch.full((50, 40), 7)
    ids[:, 30:] = PADDING
    lost = Sentences(lost=0.2).augment(ids, torch.Generator().manual_seed(0))
    assert bool((lost[:, 30:] == PADDING).all())
    assert abs(float((lost[:, :30] == UNKNOWN).float().mean()) - 0.2) < 0.03
    assert bool((ids[:, :30] == 7).all())


def test_rare_words_beyond_the_table_are_unknown() -> None:
    assert vocabulary([(0, ["x", "y", "y", "z", "z"])], 4) == {"y": 2, "z": 3}


def test_padding_changes_nothing() -> None:
    model = load_task("sst:fine-tt3").build()
    ids = torch.tensor([[5, 900, 16_000]])
    assert torch.allclose(model(torch.nn.functional.pad(ids, (0, 4))), model(ids), atol=1e-6)


def test_tables_are_those_of_the_source() -> None:
    for name, (rows, columns) in TRAINS.items():
        table = load_task(f"sst:binary-{name}").build().get_submodule("embedding")
        assert isinstance(table, TTEmbedding)
        assert (table.shape.row_modes, table.shape.col_modes) == (rows, columns)
        assert set(table.shape.ranks) <= {1, RANK}
    dense = load_task("sst:binary-full").build()
    assert tuple(dense.get_parameter("embedding.weight").shape) == (WORDS, 256)
    assert dense(Sst().example_inputs(3)).shape == (3, 2)


def test_missing_and_damaged_files_are_named(folder: Path) -> None:
    (folder / "stsa.fine.dev").write_text("7 great\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"stsa\.fine\.dev, line 1: a line is a label 0\.\.4, a space and words"):
        _ = Sst().train_set
    (folder / "stsa.fine.test").write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match="has no sentences"):
        _ = Sst().test_set
    with pytest.raises(DataError, match=r"no sst data: .* has no sst/stsa\.binary\.train.*--data FOLDER"):
        _ = Sst("binary-full").train_set


def test_weights_come_from_a_file() -> None:
    with pytest.raises(CheckpointError, match="sst:fine-full has no built-in weights"):
        Sst().pretrained()
    with pytest.raises(UnknownNameError, match="fine-tt1"):
        load_task("sst:fine-tt")
