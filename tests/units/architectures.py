"""Small networks of every architecture whose units are known, with inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

WORDS, WIDTH, HIDDEN = 60, 16, 24


def ids(seed: int = 0, batch: int = 2) -> Tensor:
    return torch.randint(1, WORDS, (batch, 7), generator=torch.Generator().manual_seed(seed))


def words(seed: int = 0) -> dict[str, Tensor]:
    return {"input_ids": ids(seed)}


def both_sides(seed: int = 0) -> dict[str, Tensor]:
    return {"input_ids": ids(seed), "decoder_input_ids": ids(seed + 100)}


def pixels(seed: int = 0) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))}


def sounds(seed: int = 0) -> dict[str, Tensor]:
    heard = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(seed))
    return {"input_features": heard, "decoder_input_ids": ids(seed)}


def rows(seed: int = 0) -> Tensor:
    return torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(seed))


class Build:
    """How a network is built, its inputs, and how many MLPs it has."""

    def __init__(self, kind: str, inputs: Callable[[int], Any], count: int, **config: Any) -> None:
        self.kind, self.inputs, self.count, self.config = kind, inputs, count, config

    def __call__(self) -> nn.Module:
        import transformers

        torch.manual_seed(0)
        made = getattr(transformers, f"{self.kind}Config")(**self.config)
        model: nn.Module = getattr(transformers, self.class_name)(made)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)  # which are all zero at first
        return model.eval()

    @property
    def class_name(self) -> str:
        return {"Gemma3Text": "Gemma3ForCausalLM", "Llama": "LlamaForCausalLM"}.get(self.kind, f"{self.kind}Model")


_ENCODER = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": HIDDEN}
_DECODER = {**_ENCODER, "vocab_size": WORDS, "num_key_value_heads": 1, "head_dim": 8}
_T5 = {"vocab_size": WORDS, "d_model": WIDTH, "d_kv": 8, "d_ff": HIDDEN, "num_layers": 1, "num_heads": 2}
_WHISPER = {
    "vocab_size": WORDS,
    "d_model": WIDTH,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": HIDDEN,
    "decoder_ffn_dim": HIDDEN,
    "num_mel_bins": 8,
    "max_source_positions": 10,
    "max_target_positions": 20,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}

NETS: dict[str, Build] = {
    "bert": Build("Bert", words, 2, vocab_size=WORDS, **_ENCODER),
    "gpt2": Build("GPT2", words, 2, vocab_size=WORDS, n_embd=WIDTH, n_layer=2, n_head=2, n_inner=HIDDEN),
    "llama": Build("Llama", words, 2, **_DECODER),
    "gemma3": Build("Gemma3Text", words, 2, **_DECODER),
    "qwen3": Build("Qwen3", words, 2, **_DECODER),
    "t5": Build("T5", both_sides, 2, **_T5),
    "t5 gated": Build("T5", both_sides, 2, **_T5, feed_forward_proj="gated-gelu"),
    "whisper": Build("Whisper", sounds, 2, **_WHISPER),
    "vit": Build("ViT", pixels, 2, image_size=8, patch_size=4, **_ENCODER),
}


def torch_encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, HIDDEN, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()
