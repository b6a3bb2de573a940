"""The command line on a language model in a folder, with texts of the user: compressed, scored, opened, generating."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tenfold.checkpoint import load_pretrained, read_record
from tests.language import folder, small_llama, text_folder

Run = Callable[..., Any]
FAST = ("--budget", "params=0.8", "--calibration-samples", "24", "--no-latency")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tied = small_llama(tie_word_embeddings=True, hidden_size=48, intermediate_size=96)
    return folder(tmp_path_factory.mktemp("lm") / "model", tied)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return text_folder(tmp_path / "texts")


def test_compress_then_eval_then_generate(model: Path, data: Path, tenfold: Run) -> None:
    made = tenfold("compress", "--task", f"lm:{model}@16", "--data", data, *FAST, "--out", "small", "--json")
    assert made.code == 0, made.err
    assert made.json["metric"]["name"] == "perplexity"
    assert set(made.json["scores"]) == {"original", "compressed"}
    reasons = {layer["path"]: layer["reason"] for layer in made.json["plan"]["layers"]}
    assert "shared" in reasons["lm_head"] or "share" in reasons["model.embed_tokens"]
    opened: Any = load_pretrained("small")
    assert opened.lm_head.weight is opened.model.embed_tokens.weight
    again = opened.generate(torch.tensor([[0, 5, 6]]), max_new_tokens=4, do_sample=False)
    assert again.shape == (1, 7)
    scored = tenfold("eval", "--checkpoint", "small", "--data", data, "--json").json
    assert scored["score"] == pytest.approx(made.json["scores"]["compressed"], rel=1e-5)
    assert set(scored["elsewhere"]) == {"elsewhere"}
    shown = tenfold("eval", "--checkpoint", "small", "--data", data)
    assert "test set: perplexity " in shown.out
    assert "elsewhere: perplexity " in shown.out
    assert read_record(Path("small")).metric.better == "lower"  # type: ignore[union-attr]


def test_training_on_labels_is_refused_and_distillation_is_not(model: Path, data: Path, tenfold: Run) -> None:
    asked = ("compress", "--task", f"lm:{model}@16", "--data", data, *FAST, "--epochs", "1")
    assert tenfold(*asked).is_error("--label-free")
    made = tenfold(*asked, "--label-free", "--batch-size", "8", "--json")
    assert made.code == 0, made.err
    assert set(made.json["scores"]) == {"original", "compressed", "tuned"}


def test_without_texts_there_is_no_score_and_that_is_said(model: Path, tenfold: Run) -> None:
    assert tenfold("eval", "--task", f"lm:{model}").is_error("needs texts", "--data")


def test_bench_reads_and_writes_tokens(model: Path, tenfold: Run, tiny: str) -> None:
    asked = (
        "bench",
        "dense",
        "dense",
        "--task",
        f"lm:{model}@16",
        "--tokens",
        "20",
        "--seconds",
        "0.2",
        "--threads",
        "1",
    )
    found = tenfold(*asked, "--json").json
    for one in (found["a"], found["b"]):
        assert one["cache_bytes"] == 2 * 2 * 2 * 12 * 20 * 4  # blocks, keys and values, heads of 12, tokens, float32
        assert one["tokens_per_second"]["decode"] == pytest.approx(16 / (one["decode"]["median_ms"] / 1000))
        assert one["tokens_per_second"]["prefill"] == pytest.approx(20 / (one["prefill"]["median_ms"] / 1000))
    assert {"prefill", "decode"} == set(found["speedup"])
    assert "written, tokens/s" in tenfold(*asked).out
    assert tenfold(*asked, "--runtime", "torch-compile").is_error("--tokens is measured in torch", code=2)
    other = tenfold("bench", "dense", "dense", "--task", tiny, "--tokens", "4", "--seconds", "0.2")
    assert other.is_error("--tokens is for language models", code=2)
