"""Models of transformers from small configs: planned, saved, opened again by tenfold and by AutoModel, equal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tenfold
from tenfold.calibration.collect import collect_moments
from tenfold.checkpoint import load_pretrained, save_pretrained
from tenfold.errors import CheckpointError
from tenfold.layers import FactorizedLayer, dense_weight, spec_of
from tenfold.pipeline import Compressed
from tenfold.tracing.inputs import call_model

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("tenfold.integrations.hf")  # teaches from_pretrained

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
VOCAB = 120


def tokens(batch: int = 2, length: int = 10) -> dict[str, Tensor]:
    mask = torch.ones(batch, length).long()
    mask[-1, length // 2 :] = 0
    return {"input_ids": torch.randint(3, VOCAB, (batch, length)), "attention_mask": mask}


def bert() -> tuple[nn.Module, Any]:
    return transformers.BertModel(transformers.BertConfig(vocab_size=VOCAB, **SMALL)), tokens()


def roberta() -> tuple[nn.Module, Any]:
    config = transformers.RobertaConfig(vocab_size=VOCAB, num_labels=3, **SMALL)
    return transformers.RobertaForSequenceClassification(config), tokens()


def gpt2() -> tuple[nn.Module, Any]:
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config), tokens(1)


def llama() -> tuple[nn.Module, Any]:
    config = transformers.LlamaConfig(vocab_size=VOCAB, num_key_value_heads=2, tie_word_embeddings=True, **SMALL)
    return transformers.LlamaForCausalLM(config), tokens(1)


def vit() -> tuple[nn.Module, Any]:
    config = transformers.ViTConfig(image_size=16, patch_size=4, num_labels=3, **SMALL)
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 16, 16)}


MODELS = [bert, roberta, gpt2, llama, vit]
GENERATING = [gpt2, llama]


def small(model: nn.Module, inputs: Any, data: Any = None, **fields: Any) -> Compressed:
    recipe = {"budget": {"params": 0.8}, "formats": "low_rank"} | fields
    return tenfold.compress(model.eval(), inputs, recipe, data=data, runtime=tenfold.Runtime(measure=False))


@pytest.mark.parametrize("make", MODELS)
def test_planned_costs_are_real_and_the_folder_opens_again(make: Callable[[], Any], tmp_path: Path) -> None:
    model, inputs = make()
    made = small(model, inputs)
    assert made.plan.factorized
    assert made.record.after.macs == made.plan.after.macs, "code that asks for weight.dtype must not cost a product"
    assert made.record.after.params == made.plan.after.params
    save_pretrained(made.model, made.plan, tmp_path / "x")
    wanted = call_model(made.model, inputs)[0]
    for again in (
        load_pretrained(tmp_path / "x"),
        tenfold.load(type(model)(model.config), tmp_path / "x")[0].eval(),
        type(model).from_pretrained(tmp_path / "x"),
    ):
        assert type(again) is type(model)
        assert torch.equal(call_model(again, inputs)[0], wanted)


@pytest.mark.parametrize("make", GENERATING)
def test_text_generators_keep_tied_embeddings_and_generate_alike(make: Callable[[], Any], tmp_path: Path) -> None:
    model, inputs = make()
    made = small(model, inputs)
    head = next(layer for layer in made.plan.layers if layer.path == "lm_head")
    assert head.action == "keep"
    assert "shares a parameter" in head.reason
    save_pretrained(made.model, made.plan, tmp_path / "x")
    again = load_pretrained(tmp_path / "x")
    assert again.lm_head.weight is again.get_input_embeddings().weight
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(again.generate(**inputs, **options), made.model.generate(**inputs, **options))


def test_conv1d_is_a_linear_layer_with_its_weight_turned() -> None:
    conv = transformers.pytorch_utils.Conv1D(6, 4)
    spec, reason = spec_of(conv)
    assert spec is not None, reason
    assert (spec.kind, spec.in_channels, spec.out_channels, spec.bias) == ("linear", 4, 6, True)
    x = torch.randn(5, 4)
    assert torch.allclose(nn.functional.linear(x, dense_weight(conv), conv.bias), conv(x), atol=1e-6)
    plan = tenfold.plan(conv, tenfold.profile(conv, x), {"rule": {"name": "fixed", "ranks": {"": 2}}})
    lower = tenfold.apply(conv, plan)
    assert isinstance(lower, FactorizedLayer)
    u, s, vh = torch.linalg.svd(conv.weight.detach().double(), full_matrices=False)
    nearest = (u[:, :2] * s[:2]) @ vh[:2]
    wanted = x.double() @ nearest + conv.bias.double()
    assert torch.allclose(lower(x).double(), wanted, atol=1e-5)
    dense = tenfold.densify(lower)
    assert isinstance(dense, nn.Linear)
    assert torch.allclose(dense(x).double(), wanted, atol=1e-5)


def test_data_make_layers_of_gpt2_better_than_weights_alone() -> None:
    model, inputs = gpt2()
    model.eval()
    batches = [tokens(8, 16) for _ in range(8)]
    ranks = {"re:.*c_fc": 8, "re:.*mlp.c_proj": 8}
    rule = {"name": "fixed", "ranks": ranks}
    blind = small(model, inputs, rule=rule, budget={})
    knowing = small(model, inputs, rule=rule, budget={}, data=batches)
    held_out = tokens(16, 16)
    wanted = model(**held_out).logits
    errors = [float((m.model(**held_out).logits - wanted).square().sum()) for m in (blind, knowing)]
    assert errors[1] < 0.9 * errors[0]


def test_padding_counts_in_no_moment() -> None:
    model, _ = bert()
    batch = tokens(3, 8)
    path = "encoder.layer.0.attention.self.query"
    spec = spec_of(model.get_submodule(path))[0]
    found = collect_moments(
        model, [batch], {path: spec, "embeddings.word_embeddings": spec_of(model.embeddings.word_embeddings)[0]}
    )
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    model.eval()(**batch)
    handle.remove()
    rows = seen[0][batch["attention_mask"].bool()].double()
    assert found[path].count == len(rows) == int(batch["attention_mask"].sum())
    assert torch.allclose(found[path].input_second_moment[0], rows.T @ rows / len(rows), atol=1e-5)
    assert found["embeddings.word_embeddings"].count == len(rows)


def test_what_padding_holds_changes_no_outcome() -> None:
    model, inputs = bert()
    model.eval()
    batches = [tokens(6, 12) for _ in range(6)]
    other = [dict(b, input_ids=torch.where(b["attention_mask"].bool(), b["input_ids"], 1)) for b in batches]
    rule = {"name": "fixed", "ranks": {"re:.*dense": 6}}
    one, two = (small(model, inputs, rule=rule, budget={}, data=d) for d in (batches, other))
    asked = tokens(4, 12)
    real = asked["attention_mask"].bool()
    a, b = (m.model(**asked).last_hidden_state[real] for m in (one, two))
    assert torch.allclose(a, b, atol=1e-4)


def test_another_class_is_refused_and_the_config_is_marked(tmp_path: Path) -> None:
    model, inputs = roberta()
    made = small(model, inputs)
    folder = save_pretrained(made.model, made.plan, tmp_path / "x")
    assert json.loads((folder / "config.json").read_text())["quantization_config"] == {"quant_method": "tenfold"}
    with pytest.raises(CheckpointError, match="another class than RobertaModel"):
        transformers.AutoModel.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="not a model of transformers"):
        save_pretrained(nn.Linear(2, 2), made.plan, tmp_path / "z")


def test_a_folder_of_save_says_what_opens_it(tmp_path: Path) -> None:
    model, inputs = bert()
    made = small(model, inputs)
    made.save(tmp_path / "x")
    assert "`tenfold.checkpoint.save_pretrained(model, plan, FOLDER)`" in (tmp_path / "x" / "README.md").read_text()
    with pytest.raises(CheckpointError, match=r"written by save\. Open it with tenfold\.load\(skeleton, '.*x'\)"):
        load_pretrained(tmp_path / "x")
    save_pretrained(made.model, made.plan, tmp_path / "y")
    assert "`tenfold.checkpoint.save_pretrained(model, plan, FOLDER)`" not in (tmp_path / "y" / "README.md").read_text()


def test_saving_again_replaces_the_folder_whole(tmp_path: Path) -> None:
    model, inputs = bert()
    made = small(model, inputs)
    for _ in range(2):
        save_pretrained(made.model, made.plan, tmp_path / "x")
    names = sorted(p.name for p in (tmp_path / "x").iterdir())
    assert names == [
        "README.md",
        "config.json",
        "model.safetensors",
        "modeling_tenfold.py",
        "plan.yaml",
        "recipe.yaml",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_the_hub_gets_whole_folders_and_gives_them_back(tmp_path: Path) -> None:
    model, inputs = bert()
    made = small(model, inputs)
    folder = save_pretrained(made.model, made.plan, tmp_path / "x")
    asked: list[Any] = []

    class Api:
        def create_repo(self, repo_id: str, **options: Any) -> None:
            asked.append(("create", repo_id, options))

        def upload_folder(self, **options: Any) -> Any:
            asked.append(("upload", options["repo_id"], options["folder_path"]))
            return SimpleNamespace(commit_url="https://hub/commit/1")

        def snapshot_download(self, repo_id: str, **options: Any) -> str:
            asked.append(("download", repo_id, options["revision"]))
            return str(folder)

    assert hf.push(folder, "me/small", private=True, api=Api()) == "https://hub/commit/1"
    assert hf.pull("me/small", revision="v1", api=Api()) == folder
    assert asked == [
        ("create", "me/small", {"private": True, "exist_ok": True}),
        ("upload", "me/small", str(folder)),
        ("download", "me/small", "v1"),
    ]
    with pytest.raises(CheckpointError):
        hf.push(tmp_path / "nothing", "me/small", api=Api())
    assert len(asked) == 3, "nothing is sent that does not open"
