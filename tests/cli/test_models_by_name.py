"""The command line on a model of transformers in a folder: no task, no labels, sentences to calibrate with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tenfold.checkpoint import load_pretrained

transformers = pytest.importorskip("transformers")

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *["a", "film", "that", "moves", "and", "moving", "pictures", "of", "good", "bad", "dull", "minds"],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder as transformers writes it: a small BERT and its tokenizer."""
    path = tmp_path_factory.mktemp("hub") / "bert"
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    transformers.BertModel(config).save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizerFast(vocab=str(path / "vocab.txt")).save_pretrained(path)
    return path


def cosine(folder: Path, small: torch.nn.Module, text: Path) -> float:
    """Return the mean cosine of all outputs over the real tokens, one sentence at a time."""
    dense = transformers.BertModel.from_pretrained(folder).eval()
    tokens = transformers.BertTokenizerFast.from_pretrained(folder)
    cosines = []
    for sentence in text.read_text().splitlines():
        batch = tokens(sentence, return_tensors="pt")
        with torch.no_grad():
            pairs = zip(dense(**batch).to_tuple(), small(**batch).to_tuple(), strict=True)
            for a, b in pairs:
                x, y = (t.reshape(-1, t.shape[-1]) for t in (a, b))
                cosines.append(torch.nn.functional.cosine_similarity(x, y))
    return float(torch.cat(cosines).mean())


def test_compress_with_sentences_then_open_the_checkpoint_alone(
    folder: Path, tmp_path: Path, tenfold: Callable[..., Any]
) -> None:
    text = tmp_path / "sentences.txt"
    text.write_text("\n".join(" ".join(WORDS[5 + i % 9 : 8 + i % 9 + i % 3]) for i in range(60)))
    made = tenfold(
        *("compress", "--task", f"hf:{folder}", "--budget", "params=0.8", "--formats", "low_rank", "--data", text),
        *("--no-latency", "--out", tmp_path / "half", "--json"),
    )
    assert made.code == 0, made.err
    assert "without labels" in made.err
    assert made.json["after"]["params"] <= 0.8 * made.json["before"]["params"]
    assert made.json["after"]["score"] is None
    assert {"config.json", "tokenizer.json"} <= {p.name for p in (tmp_path / "half").iterdir()}
    assert made.json["agreement"]["cosine"] > 0.5
    model = load_pretrained(tmp_path / "half")
    assert sum(p.numel() for p in model.parameters()) == made.json["after"]["params"]
    unseen = tmp_path / "unseen.txt"
    unseen.write_text("\n".join(" ".join(WORDS[6 + i % 7 : 10 + i % 7]) for i in range(7)))
    told = tenfold("eval", "--task", f"hf:{folder}", "--checkpoint", tmp_path / "half", "--data", unseen, "--json")
    assert told.code == 0, told.err
    assert told.json["score"] is None
    assert told.json["agreement"]["samples"] == 7
    assert told.json["agreement"]["cosine"] == pytest.approx(cosine(folder, model, unseen), abs=1e-4)
    assert (
        "against the original on 7 samples"
        in tenfold("eval", "--task", f"hf:{folder}", "--checkpoint", tmp_path / "half", "--data", unseen).out
    )
    blind = tenfold("eval", "--task", f"hf:{folder}", "--checkpoint", tmp_path / "half")
    assert blind.is_error("model without data", "--data")
    opened = tenfold("profile", "--checkpoint", tmp_path / "half", "--json")
    assert opened.code == 0, opened.err
    assert opened.json["params"] == made.json["after"]["params"]


def test_what_needs_labels_is_refused_with_the_reason(folder: Path, tenfold: Callable[..., Any]) -> None:
    assert tenfold("eval", "--task", f"hf:{folder}").is_error("without labels", "cannot be scored")
    tuned = tenfold("compress", "--task", f"hf:{folder}", "--budget", "params=0.8", "--epochs", "1", "--no-latency")
    assert tuned.is_error("without labels", "trained")
