"""Perplexity block by block is that of the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tenfold.errors import DataError
from tenfold.streaming import streamed_perplexity
from tenfold.tasks.perplexity import perplexity
from tests.language import folder, small_llama


@pytest.mark.parametrize("tied", [False, True])
def test_equal_to_the_whole(tmp_path: Path, tied: bool) -> None:
    model = small_llama(num_hidden_layers=3, tie_word_embeddings=tied)
    weights = folder(tmp_path / "model", model)
    batches = [{"input_ids": ids} for ids in torch.randint(4, 50, (3, 2, 20), generator=torch.manual_seed(1))]
    batches.append({"input_ids": batches[0]["input_ids"][:1].expand(3, -1)})  # rows that are alike
    steps: list[tuple[int, int]] = []
    found = streamed_perplexity(weights, batches, progress=lambda *step: steps.append(step))
    assert found == pytest.approx(perplexity(model, batches), rel=1e-5)
    assert steps == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(DataError, match="no token"):
        streamed_perplexity(weights, [])
