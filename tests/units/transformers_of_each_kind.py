"""Small networks of every supported architecture, from their configurations, with inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Built = tuple[nn.Module, Any]
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_WORDS = 100
_ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _ids(rows: int = 2) -> torch.Tensor:
    return torch.randint(3, _WORDS, (rows, 7))


def bert() -> Built:
    import transformers as tf

    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return tf.BertModel(tf.BertConfig(vocab_size=_WORDS, **_SIZES)), {"input_ids": _ids(), "attention_mask": mask}


def distilbert() -> Built:
    import transformers as tf

    config = tf.DistilBertConfig(vocab_size=_WORDS, dim=32, n_layers=2, n_heads=4, hidden_dim=48)
    return tf.DistilBertModel(config), {"input_ids": _ids()}


def vit() -> Built:
    import transformers as tf

    config = tf.ViTConfig(image_size=16, patch_size=4, **_SIZES)
    return tf.ViTModel(config), {"pixel_values": torch.randn(2, 3, 16, 16)}


def whisper() -> Built:
    import transformers as tf

    config = tf.WhisperConfig(
        vocab_size=_WORDS, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=10,
        decoder_start_token_id=1, **_ENDS,
    )  # fmt: skip
    return tf.WhisperModel(config), {"input_features": torch.randn(1, 80, 20), "decoder_input_ids": _ids(1)}


def t5() -> Built:
    import transformers as tf

    config = tf.T5Config(
        vocab_size=_WORDS, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return tf.T5Model(config), {"input_ids": _ids(), "decoder_input_ids": _ids()}


def gpt2() -> Built:
    import transformers as tf

    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=_WORDS, n_embd=32, n_layer=2, n_head=4, **_ENDS)), {
        "input_ids": _ids()
    }


def llama() -> Built:
    import transformers as tf

    config = tf.LlamaConfig(vocab_size=_WORDS, num_key_value_heads=2, **_SIZES, **_ENDS)
    return tf.LlamaForCausalLM(config), {"input_ids": _ids()}


def qwen3() -> Built:
    import transformers as tf

    config = tf.Qwen3Config(vocab_size=_WORDS, num_key_value_heads=2, head_dim=16, **_SIZES, **_ENDS)
    return tf.Qwen3ForCausalLM(config), {"input_ids": _ids()}


def gemma3() -> Built:
    import transformers as tf

    config = tf.Gemma3TextConfig(vocab_size=_WORDS, num_key_value_heads=1, head_dim=16, **_SIZES, **_ENDS)
    return tf.Gemma3ForCausalLM(config), {"input_ids": _ids()}


def encoder() -> Built:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2), torch.randn(2, 5, 32)


def attention() -> Built:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x)[0]

    return Own(), torch.randn(5, 2, 32)


BUILDERS: dict[str, Callable[[], Built]] = {
    f.__name__: f for f in (bert, distilbert, vit, whisper, t5, gpt2, llama, qwen3, gemma3, encoder, attention)
}
CAUSAL = ("gpt2", "llama", "qwen3", "gemma3")
TURNED = ("llama", "qwen3", "gemma3")  # rotary positions


def built(name: str) -> Built:
    """Return the network in evaluation mode, its biases and norms not at their first values, and inputs."""
    torch.manual_seed(0)
    model, inputs = BUILDERS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval(), inputs
