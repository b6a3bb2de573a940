"""Folders of compressed transformers, however they were written, open with equal outputs: with tenfold and without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tenfold
from tenfold.checkpoint import load_pretrained, save_pretrained
from tenfold.errors import CheckpointError
from tenfold.layers import FactorizedLayer
from tenfold.pipeline import Compressed
from tenfold.tracing.inputs import call_model

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("tenfold.integrations.hf")  # teaches from_pretrained

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
VOCAB = 100
EMBEDDINGS = "re:.*embeddings.*"
ALONE = Path(__file__).parent / "without_tenfold.py"


def ids() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, VOCAB, (2, 10))}


def bert() -> tuple[nn.Module, Any, dict[str, Any]]:
    """With factors in an embedding, and one layer that is kept."""
    model = transformers.BertModel(transformers.BertConfig(vocab_size=VOCAB, **SMALL))
    return model, ids(), {"re:.*word_embeddings": 6, "re:.*query|.*intermediate.dense": 8}


def llama() -> tuple[nn.Module, Any, dict[str, Any]]:
    """With a head that was tied in the config, then untied by hand and factorized."""
    config = transformers.LlamaConfig(vocab_size=VOCAB, num_key_value_heads=2, tie_word_embeddings=True, **SMALL)
    model = transformers.LlamaForCausalLM(config)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model, ids(), {"lm_head": 12, "re:.*down_proj": 16}


def vit() -> tuple[nn.Module, Any, dict[str, Any]]:
    """With a convolution, and layers that are asked for the dtype of their weight in every forward."""
    config = transformers.ViTConfig(image_size=16, patch_size=4, num_labels=3, **SMALL)
    model = transformers.ViTForImageClassification(config)
    return model, {"pixel_values": torch.randn(2, 3, 16, 16)}, {"re:.*projection": 8, "re:.*fc1|.*query": 8}


def t5() -> tuple[nn.Module, Any, dict[str, Any]]:
    """With tied embeddings that stay tied, and an encoder with a config of its own."""
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=VOCAB, decoder_start_token_id=0, **sizes)
    )
    return model, {**ids(), "decoder_input_ids": ids()["input_ids"]}, {"re:.*wo|.*SelfAttention.q": 8}


def narrow() -> tuple[nn.Module, Any, dict[str, Any]]:
    """With narrower MLPs and heads of several sizes, beside factors."""
    sizes = SMALL | {"intermediate_size": 128}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=VOCAB, **sizes))
    return model, ids(), {}


MODELS = {
    "bert": (bert, "AutoModel"),
    "llama": (llama, "AutoModelForCausalLM"),
    "vit": (vit, "AutoModelForImageClassification"),
    "t5": (t5, "AutoModelForSeq2SeqLM"),
    "narrow": (narrow, "AutoModel"),
}


def compressed(make: Callable[[], Any]) -> tuple[Compressed, Any]:
    model, inputs, ranks = make()
    recipe = {"rule": {"name": "fixed", "ranks": ranks}, "formats": "low_rank", "keep_ends": False}
    if not ranks:
        recipe = {
            "budget": "params=0.75",
            "formats": "low_rank",
            "units": ("mlp_width", "query_key"),
            "keep": EMBEDDINGS,
        }
    data = None if ranks else [ids() for _ in range(20)]
    made = tenfold.compress(model.eval(), inputs, recipe, data=data, runtime=tenfold.Runtime(measure=False))
    assert len(made.plan.factorized) > 1
    return made, inputs


def outputs(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        return call_model(model, inputs)[0]


@pytest.mark.parametrize("name", MODELS)
def test_save_pretrained_of_transformers_writes_folders_that_open(name: str, tmp_path: Path) -> None:
    make, auto = MODELS[name]
    made, inputs = compressed(make)
    wanted = outputs(made.model, inputs)
    made.model.save_pretrained(tmp_path / "stock")
    again = load_pretrained(tmp_path / "stock")
    assert torch.equal(outputs(again, inputs), wanted)
    for model in (made.model, again):
        named = {path for path, m in model.named_modules() if isinstance(m, FactorizedLayer)}
        assert named == {layer.path for layer in made.plan.factorized} - set(made.plan.narrowed_paths)
    by_auto = getattr(transformers, auto).from_pretrained(tmp_path / "stock")
    assert torch.equal(outputs(by_auto, inputs), wanted)
    for model in (again, by_auto, load_pretrained(save_pretrained(made.model, made.plan, tmp_path / "own"))):
        model.save_pretrained(tmp_path / "next")
        assert torch.equal(outputs(load_pretrained(tmp_path / "next"), inputs), wanted)
        assert "auto_map" not in json.loads((tmp_path / "next" / "config.json").read_text()), "the file is not there"


class MeanPooling(nn.Module):
    """What a sentence encoder is around its transformer."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(32, width)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.encoder(input_ids=input_ids).last_hidden_state.mean(1))


def test_the_model_inside_another_module_is_saved(tmp_path: Path) -> None:
    model, inputs, _ = bert()
    recipe = {"rule": {"name": "fixed", "ranks": {"re:.*query": 8}}, "formats": "low_rank"}
    quick = tenfold.Runtime(measure=False)
    made = tenfold.compress(MeanPooling(model, 16).eval(), inputs, recipe, runtime=quick)
    wanted = outputs(made.model.encoder, inputs)
    made.model.encoder.save_pretrained(tmp_path / "stock")
    folder = save_pretrained(made.model, made.plan, tmp_path / "own", record=made.record)
    assert (folder / "modeling_tenfold.py").is_file()
    for again in (load_pretrained(tmp_path / "stock"), load_pretrained(folder), tenfold.load(model, folder)[0].eval()):
        assert torch.equal(outputs(again, inputs), wanted)
    recipe["rule"]["ranks"]["head"] = 4
    made = tenfold.compress(MeanPooling(model, 16).eval(), inputs, recipe, runtime=quick)
    with pytest.raises(CheckpointError, match="'head' is factorized and lies outside of 'encoder'"):
        save_pretrained(made.model, made.plan, tmp_path / "more")


def test_weights_in_several_files_open(tmp_path: Path) -> None:
    made, inputs = compressed(bert)
    made.model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(outputs(load_pretrained(tmp_path), inputs), outputs(made.model, inputs))


def test_experts_that_were_taken_apart_open(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(vocab_size=VOCAB, num_local_experts=4, num_key_value_heads=2, **SMALL)
    model, inputs = transformers.MixtralForCausalLM(config).eval(), ids()
    recipe = {"budget": "params=0.6", "formats": "low_rank"}
    made = tenfold.compress(model, inputs, recipe, runtime=tenfold.Runtime(measure=False))
    assert made.plan.unrolled
    made.model.save_pretrained(tmp_path / "stock")
    assert torch.equal(outputs(load_pretrained(tmp_path / "stock"), inputs), outputs(made.model, inputs))
    own = save_pretrained(made.model, made.plan, tmp_path / "own")
    assert not (own / "modeling_tenfold.py").exists()
    assert "auto_map" not in json.loads((own / "config.json").read_text())


def test_a_dense_model_again_is_saved_as_one(tmp_path: Path) -> None:
    made, inputs = compressed(bert)
    dense = tenfold.densify(made.model)
    dense.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "tenfold" not in config
    assert "quantization_config" not in config
    again = transformers.AutoModel.from_pretrained(tmp_path)
    assert torch.allclose(outputs(again, inputs), outputs(made.model, inputs), atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_model_that_is_narrower_alike_in_all_layers_is_a_stock_model(kind: str, tmp_path: Path) -> None:
    sizes = SMALL | {"intermediate_size": 128, "vocab_size": VOCAB}
    model = {
        "bert": lambda: transformers.BertModel(transformers.BertConfig(**sizes)),
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=2, **sizes)),
    }[kind]().eval()
    inputs, data, quick = ids(), [ids() for _ in range(20)], tenfold.Runtime(measure=False)
    recipe = {"budget": "params=0.8", "formats": "tucker2", "units": "mlp_width", "keep": "re:.*embed.*"}
    plan = tenfold.compress(model, inputs, recipe, data=data, runtime=quick).plan
    pivots = {unit.pivot for unit in plan.narrowed}
    assert len(pivots) == 2
    alike = plan.replace(
        units=tuple(unit.replace(size={"width": 64}) for unit in plan.units),
        layers=tuple(one.replace(rank={"rank": 64}) if one.path in pivots else one for one in plan.layers),
    )
    made = tenfold.compress(model, inputs, alike, data=data, runtime=quick)
    folder = save_pretrained(made.model, made.plan, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert config["intermediate_size"] == 64
    assert not {"tenfold", "quantization_config", "auto_map"} & set(config)
    assert not (folder / "modeling_tenfold.py").exists()
    wanted = outputs(made.model, inputs)
    for again in (
        type(model).from_pretrained(folder),
        load_pretrained(folder),
        tenfold.load(model, folder)[0],
        tenfold.load(type(model)(transformers.AutoConfig.from_pretrained(folder)), folder)[0].eval(),
    ):
        assert torch.equal(outputs(again, inputs), wanted)


def test_the_config_of_the_original_is_left_alone_and_parts_are_noted() -> None:
    model, inputs, ranks = t5()
    recipe = {"rule": {"name": "fixed", "ranks": ranks}, "formats": "low_rank"}
    made = tenfold.compress(model.eval(), inputs, recipe, runtime=tenfold.Runtime(measure=False))
    assert not hasattr(model.config, "tenfold")
    encoder = made.model.encoder
    assert set(encoder.config.tenfold["layers"]) == {
        p for p, m in encoder.named_modules() if isinstance(m, FactorizedLayer)
    }


def test_a_note_that_is_none_is_refused(tmp_path: Path) -> None:
    made, _ = compressed(bert)
    made.model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del next(iter(config["tenfold"]["layers"].values()))["rank"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="the entry 'tenfold' of the config cannot be read"):
        load_pretrained(tmp_path)


def test_folders_open_without_tenfold(tmp_path: Path) -> None:
    for name, (make, _) in MODELS.items():
        made, inputs = compressed(make)
        save_pretrained(made.model, made.plan, tmp_path / name)
        torch.save((inputs, outputs(made.model, inputs)), tmp_path / f"{name}.pt")
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert "AutoModel" in config["auto_map"], "by which vLLM builds it"
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    autos = [f"{name}={auto}" for name, (_, auto) in MODELS.items()]
    command = [sys.executable, str(ALONE), str(tmp_path), *autos]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [word for name in MODELS for word in (name, "equal")]
