"""Grouped products are counted by the rows of their groups, and mixtures of experts of transformers by their tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tenfold.profiling import profile
from tenfold.profiling.counting import MacCounter
from tenfold.profiling.formulas import grouped_flops
from tenfold.surgery import separate, stacks

ENDS = torch.tensor([8, 8, 24], dtype=torch.int32)
ROWS, COLUMNS = torch.randn(32, 16), torch.randn(32, 8)
STACK = torch.randn(3, 16, 8)

# Shapes of both sides with the groups along rows, columns, what is summed over, and a third axis; MACs by hand.
GROUPED: list[tuple[Tensor, Tensor, Tensor | None, int]] = [
    (ROWS, STACK, ENDS, 24 * 16 * 8),
    (torch.randn(3, 4, 16), torch.randn(16, 32), ENDS, 4 * 16 * 24),
    (ROWS.t(), COLUMNS, ENDS, 16 * 8 * 24),
    (torch.randn(3, 4, 16), STACK, None, 3 * 4 * 16 * 8),
]


@pytest.mark.parametrize(("left", "right", "ends", "macs"), GROUPED, ids=["rows", "columns", "inner", "third axis"])
def test_grouped_products(left: Tensor, right: Tensor, ends: Tensor | None, macs: int) -> None:
    assert grouped_flops(left, right, ends) == 2 * macs
    assert grouped_flops(left, right, torch.ones(3), torch.ones(3), offs=ends) == 2 * macs  # scales of eight bits
    with MacCounter() as counter:
        functional.grouped_mm(left, right, offs=ends)
    assert (counter.macs, counter.uncounted) == (macs, {})


def test_without_values_all_rows_count() -> None:
    assert grouped_flops(ROWS.to("meta"), STACK.to("meta"), ENDS.to("meta")) == 2 * 32 * 16 * 8


transformers = pytest.importorskip("transformers")

BATCH, LENGTH, WIDTH, INNER, COUNT, VOCAB = 2, 12, 32, 48, 4, 64
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "moe_intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "num_local_experts": COUNT,
    "num_experts": COUNT,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
IDS = torch.randint(1, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
TOKENS = BATCH * LENGTH
ATTENTION = TOKENS * (4 * WIDTH * WIDTH + 2 * LENGTH * WIDTH)  # four projections, and two products with all tokens
ROUTER, EXPERT = TOKENS * WIDTH * COUNT, 3 * WIDTH * INNER  # gate, up and down
HEAD = TOKENS * WIDTH * VOCAB


def model_of(kind: str, implementation: str | None) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES)
    made: Any = transformers.AutoModelForCausalLM.from_config(config, experts_implementation=implementation).eval()
    for parameter in made.parameters():
        if parameter.dim() > 1:  # experts start with what is in the memory
            nn.init.normal_(parameter, std=0.15)
    return made  # type: ignore[no-any-return]


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_cost_what_their_tokens_do(kind: str, implementation: str) -> None:
    model = model_of(kind, implementation)
    assert model.config._experts_implementation == implementation
    cost = profile(model, {"input_ids": IDS})
    assert cost.macs == 2 * (ATTENTION + ROUTER + TOKENS * 2 * EXPERT) + HEAD
    assert cost.uncounted == {}
    found = stacks(model, {"input_ids": IDS})
    turned = ".T" if kind == "gpt_oss" else ""  # which stores (in, out)
    assert found == {f"model.layers.{n}.mlp.experts": f"gate_up_proj{turned}, down_proj{turned}" for n in range(2)}
    opened = separate(model, found)
    again = profile(opened, {"input_ids": IDS})
    assert (again.cost, again.uncounted) == (cost.cost, {})
    with torch.no_grad():
        assert torch.allclose(opened(IDS).logits, model(IDS).logits, atol=1e-4)


KIN: dict[str, dict[str, Any]] = {  # with loops over splits, products with all experts, no gates, other layouts
    "jetmoe": {"kv_channels": 8, "num_attention_heads": None, "head_dim": None},
    "llama4_text": {"intermediate_size_mlp": INNER, "interleave_moe_layer_step": 1},
    "aria_text": {},
    "olmoe": {},
    "nemotron_h": {
        "num_hidden_layers": 2,
        "hybrid_override_pattern": "*E",
        "n_routed_experts": COUNT,
        "n_group": 1,
        "topk_group": 1,
        "moe_shared_expert_intermediate_size": INNER,
    },
}


@pytest.mark.parametrize("kind", KIN)
def test_kin_are_taken_apart(kind: str) -> None:
    sizes = {name: size for name, size in (SIZES | KIN[kind]).items() if size is not None}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **sizes)
    model: Any = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)
    found = stacks(model, {"input_ids": IDS})
    assert found
    opened = separate(model, found)
    first, second = profile(model, {"input_ids": IDS}), profile(opened, {"input_ids": IDS})
    assert (first.cost, first.uncounted) == (second.cost, second.uncounted)
    with torch.no_grad():
        assert torch.allclose(opened(IDS).logits, model(IDS).logits, atol=1e-4)


def test_the_kernel_of_transformers_without_torch_s_own() -> None:
    from transformers.integrations import moe  # noqa: F401 - registers it

    with MacCounter() as counter:
        torch.ops.transformers.grouped_mm_fallback(ROWS, STACK, ENDS)
    assert (counter.macs, counter.uncounted) == (24 * 16 * 8, {})


def test_switch_counts_one_expert_for_each_token() -> None:
    torch.manual_seed(0)
    config = transformers.SwitchTransformersConfig(
        vocab_size=VOCAB,
        d_model=WIDTH,
        d_kv=8,
        d_ff=INNER,
        num_heads=4,
        num_layers=1,
        num_sparse_encoder_layers=1,
        num_decoder_layers=1,
        num_sparse_decoder_layers=1,
        num_experts=COUNT,
        expert_capacity=LENGTH,
        decoder_start_token_id=0,
    )
    model = transformers.SwitchTransformersForConditionalGeneration(config).eval()
    cost = profile(model, {"input_ids": IDS, "decoder_input_ids": IDS})
    assert cost.macs == 3 * ATTENTION + 2 * (ROUTER + TOKENS * 2 * WIDTH * INNER) + HEAD
    assert cost.uncounted == {}
