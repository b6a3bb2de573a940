"""A tiny language model in a folder, with a tokenizer of whole words and texts, for tests of what is done with one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

WORDS = [*(f"{a}{b}" for a in "bdfgklmnprst" for b in ("a", "e", "i", "o"))]
SPECIAL = ["<s>", "</s>", "<unk>"]
VOCABULARY = len(SPECIAL) + len(WORDS) + 1  # and the line break


def small_llama(**changes: Any) -> Any:
    """Return a random Llama with grouped heads, in eval mode, the same every time."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "vocab_size": VOCABULARY, "bos_token_id": 0}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes | {"eos_token_id": 1, "initializer_range": 0.2} | changes)
    return transformers.LlamaForCausalLM(config).eval()


def tokenizer(*, start: bool = True) -> Any:
    """Return a tokenizer of words and line breaks that puts ``<s>`` before a text, or does not."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    known = {word: number for number, word in enumerate([*SPECIAL, "\n", *WORDS])}
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="<unk>"))  # noqa: S106
    own.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Split(" ", "removed"), tokenizers.pre_tokenizers.Split("\n", "isolated")]
    )
    if start:
        own.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    names = dict(zip(("bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=own, **names)


def texts(lines: int, seed: int = 0) -> str:
    """Return lines of random words, between five and fifteen."""
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randint(len(WORDS), (5 + n % 11,), generator=generator).tolist() for n in range(lines)]
    return "\n".join(" ".join(WORDS[i] for i in line) for line in draw)


def text_folder(path: Path) -> Path:
    """Write texts to learn from, to score on, and of another kind; return the folder."""
    path.mkdir()
    for name, lines, seed in (("train", 100, 1), ("test", 20, 2), ("elsewhere", 30, 3)):
        (path / f"{name}.txt").write_text(texts(lines, seed))
    return path


def folder(path: Path, model: Any = None, *, start: bool = True) -> Path:
    """Write a model and its tokenizer as transformers does; return the folder."""
    (small_llama() if model is None else model).save_pretrained(path)
    tokenizer(start=start).save_pretrained(path)
    return path
