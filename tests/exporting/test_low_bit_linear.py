"""Few bits and a low-rank correction: the optimum of the outputs' error, in closed form, and counted in bytes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from tenfold.decompositions import Moments
from tenfold.errors import ExportError, RankError
from tenfold.exporting.low_bit_linear import (
    CorrectedLinear,
    correction,
    low_bit_bytes,
    low_bit_linear,
    rounded,
    stored_bytes,
)

pytest.importorskip("torchao")


def correlated(rows: int, width: int) -> Tensor:
    """Return inputs of which some directions are far larger than others, not centred."""
    scales = torch.logspace(0, -2, width)
    return torch.randn(rows, width) * scales @ torch.linalg.qr(torch.randn(width, width))[0] + 0.1


def test_the_correction_is_the_closed_form_of_the_paper() -> None:
    weight, x = torch.randn(24, 16, dtype=torch.float64), correlated(400, 16).double()
    coarse = (weight * 2).round() / 2
    found = correction(weight, coarse, 3, Moments.of(x)).factorization().to_dense()
    root = scipy.linalg.sqrtm((x.T @ x / len(x)).numpy()).real
    u, s, vh = np.linalg.svd((weight - coarse).numpy() @ root, full_matrices=False)
    wanted = (u[:, :3] * s[:3]) @ vh[:3] @ np.linalg.inv(root)
    assert np.allclose(found.detach().numpy(), wanted, atol=1e-6)


def test_without_data_it_is_the_svd_of_the_error() -> None:
    weight = torch.randn(24, 16, dtype=torch.float64)
    coarse = weight.round()
    found = correction(weight, coarse, 3).factorization().to_dense()
    u, s, vh = np.linalg.svd((weight - coarse).numpy(), full_matrices=False)
    assert np.allclose(found.detach().numpy(), (u[:, :3] * s[:3]) @ vh[:3], atol=1e-8)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64, bias=False)).eval()


@pytest.mark.parametrize("bits", [8, 4])
def test_no_correction_makes_the_outputs_of_a_layer_worse_and_data_make_them_better(bits: Any) -> None:
    model, x = network(), correlated(2000, 64)
    errors = {}
    for name, rank, batches in (("none", 0, None), ("blind", 8, None), ("data", 8, [x]), ("more", 16, [x])):
        small = low_bit_linear(model, batches, bits=bits, rank=rank)
        with torch.no_grad():
            errors[name] = float((small[0](x) - model[0](x)).square().mean())
    assert errors["more"] < errors["data"] < errors["blind"] <= errors["none"]
    assert errors["data"] < 0.75 * errors["none"]


def test_bytes_are_those_of_the_stored_tensors() -> None:
    model = network()
    floats = 64 * 96 * 2
    assert stored_bytes(model) == 4 * (floats + 96)
    biases = 4 * 96
    eight = low_bit_linear(model, bits=8)
    assert stored_bytes(eight) == floats + (96 + 64) * (4 + 1) + biases  # scales, and zero points of a byte
    four = low_bit_linear(model, bits=4, rank=4)
    scales = floats // 32 * (4 + 1)
    assert stored_bytes(four) == floats // 2 + scales + biases + 2 * 4 * 4 * (64 + 96)


def test_a_small_language_model_keeps_its_predictions() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = transformers.LlamaConfig(vocab_size=100, tie_word_embeddings=True, initializer_range=0.2, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    batches = [{"input_ids": torch.randint(0, 100, (8, 32))} for _ in range(4)]
    asked = {"input_ids": torch.randint(0, 100, (8, 32))}
    with torch.no_grad():
        wanted = model(**asked).logits.log_softmax(-1)
        losses = []
        for rank in (0, 16):
            small = low_bit_linear(model, batches, bits=4, rank=rank)
            found = small(**asked).logits.log_softmax(-1)
            losses.append(float((wanted.exp() * (wanted - found)).sum(-1).mean()))
    assert 0 < losses[1] < 0.8 * losses[0]
    assert isinstance(small.model.layers[0].mlp.down_proj, CorrectedLinear)
    assert small.lm_head.weight is small.model.embed_tokens.weight, "a tied head stays as it is"


def test_layers_that_cannot_be_rounded_stay_and_nonsense_is_refused() -> None:
    odd = nn.Sequential(nn.Linear(20, 32), nn.Linear(32, 32)).eval()
    small = low_bit_linear(odd, bits=4)
    assert torch.equal(small[0].weight, odd[0].weight), "20 inputs are no groups of 32"
    dense = odd[1].weight.detach()
    assert math.isclose(float((rounded(small[1]) - dense).norm() / dense.norm()), 0.06, rel_tol=0.5)
    with pytest.raises(ExportError, match="no linear layer"):
        low_bit_linear(nn.Sequential(nn.Conv2d(3, 4, 1)))
    with pytest.raises(RankError, match="rank -1"):
        low_bit_linear(odd, rank=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "rank", "group_size"), [(8, 0, 32), (8, 8, 32), (4, 0, 32), (4, 8, 16), (4, 33, 64)])
def test_bytes_are_known_before_anything_is_rounded(bits: Any, rank: int, group_size: int, dtype: torch.dtype) -> None:
    model = nn.Sequential(network(), nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4), nn.Linear(100, 7)).to(dtype).eval()
    model[3].bias.data = model[3].bias.data.float()
    how = {"bits": bits, "rank": rank, "group_size": group_size}
    assert low_bit_bytes(model, **how) == stored_bytes(low_bit_linear(model, **how))
    assert low_bit_bytes(model, **how) < stored_bytes(model)


def test_bytes_of_what_cannot_be_rounded_are_refused() -> None:
    with pytest.raises(ExportError, match="no linear layer"):
        low_bit_bytes(nn.Conv1d(4, 4, 1))
    with pytest.raises(RankError, match="rank -1"):
        low_bit_bytes(network(), rank=-1)
