"""Speed and caches of language models that write."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tenfold.errors import ProfileError
from tenfold.profiling.generation import WRITTEN, _Decoding, _read, cache_bytes, compare_generation
from tests.language import VOCABULARY, small_llama


def test_caches_and_speeds_of_two_models() -> None:
    wide, slim = small_llama(), small_llama(num_key_value_heads=1)
    ids = torch.randint(VOCABULARY, (2, 12))
    found = compare_generation({"wide": wide, "slim": slim}, ids, seconds=0.2, threads=1)
    assert found.cache_bytes == {"wide": 2 * 2 * 2 * 2 * 8 * 12 * 4, "slim": 2 * 2 * 2 * 1 * 8 * 12 * 4}
    read, wrote = found.tokens_per_second("slim")
    assert read == pytest.approx(24e3 / found.prefill.latencies["slim"].median_ms)
    assert wrote == pytest.approx(2 * WRITTEN * 1e3 / found.decode.latencies["slim"].median_ms)


def test_what_is_written_follows_the_prompt_and_leaves_the_cache_alone() -> None:
    model, ids = small_llama(), torch.randint(VOCABULARY, (1, 12))
    cache = _read(model, ids)
    before = cache_bytes(cache)
    with torch.no_grad():
        last = _Decoding(model, cache)(ids[:, -1:])
        whole = model(input_ids=torch.cat([ids, ids[:, -1:].expand(1, WRITTEN)], dim=1)).logits[:, -1:]
    assert torch.allclose(last, whole, atol=1e-4)
    assert cache_bytes(cache) == before


def test_a_model_without_a_cache_is_refused() -> None:
    class Bare(nn.Module):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            return input_ids

    with pytest.raises(ProfileError, match="keeps no cache"):
        compare_generation({"bare": Bare()}, torch.zeros(1, 4, dtype=torch.long))
