"""What a folder says of itself on the Hub, and that a part of a SentenceTransformer stays one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tenfold
from tenfold.checkpoint import save_pretrained
from tenfold.checkpoint.hub_facts import hub_facts
from tenfold.pipeline import Compressed

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
CARD = "---\nlicense: apache-2.0\nlanguage: en\ndatasets: [snli]\ntags: [sentence-similarity]\n---\n# Encoder\n"
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def encoder(source: Path, modules: list[dict[str, Any]] = MODULES) -> Any:
    """Return an encoder from a folder of sentence-transformers."""
    transformers.BertModel(transformers.BertConfig(vocab_size=60, **SMALL)).save_pretrained(source)
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (source / "sentence_bert_config.json").write_text('{"max_seq_length": 256}')
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "README.md").write_text(CARD)
    return transformers.AutoModel.from_pretrained(source).eval()


def small(model: Any) -> Compressed:
    ids = {"input_ids": torch.randint(3, 60, (2, 8))}
    recipe = {"budget": "params=0.7", "formats": "low_rank"}
    return tenfold.compress(model, ids, recipe, runtime=tenfold.Runtime(measure=False))


def head(card: Path) -> dict[str, Any]:
    return yaml.safe_load(card.read_text().split("---\n")[1])


def test_a_part_of_a_sentence_transformer_stays_one(tmp_path: Path) -> None:
    made = small(encoder(tmp_path / "source"))
    folder = tmp_path / "out"
    for _ in range(2):  # the second replaces the first, folders included
        save_pretrained(made.model, made.plan, folder, record=made.record)
    for name in ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json"):
        assert (folder / name).read_text() == (tmp_path / "source" / name).read_text()
    assert (folder / "2_Normalize").is_dir()
    found = head(folder / "README.md")
    assert found["library_name"] == "sentence-transformers"
    assert (found["license"], found["language"], found["datasets"]) == ("apache-2.0", "en", ["snli"])
    assert found["tags"] == ["sentence-similarity", "tenfold", "low-rank", "model-compression"]
    assert "base_model" not in found, "a folder is no name on the Hub"
    text = (folder / "README.md").read_text()
    assert "SentenceTransformer(path, trust_remote_code=True)" in text
    assert "`params=0.7`" in text
    again = tenfold.checkpoint.load_pretrained(folder)  # and once more from there
    save_pretrained(again, made.plan, tmp_path / "next")
    assert (tmp_path / "next" / "1_Pooling" / "config.json").is_file()
    assert head(tmp_path / "next" / "README.md")["tags"] == found["tags"]


@pytest.mark.parametrize("path", ["../1_Pooling", "/1_Pooling"])
def test_modules_outside_of_the_folder_are_not_followed(path: str, tmp_path: Path) -> None:
    made = small(encoder(tmp_path / "source", [MODULES[0], {**MODULES[1], "path": path}]))
    save_pretrained(made.model, made.plan, tmp_path / "out")
    assert not (tmp_path / "out" / "modules.json").exists()


def test_a_model_that_has_not_them_any_more_leaves_no_files_behind(tmp_path: Path) -> None:
    made = small(encoder(tmp_path / "source"))
    folder = save_pretrained(made.model, made.plan, tmp_path / "out")
    tenfold.save(made.model, made.plan, folder)
    left = {p.name for p in folder.iterdir()} & {"config.json", "modeling_tenfold.py", "modules.json"}
    assert not left, "they are of the earlier checkpoint"


def test_the_base_and_the_class_are_named() -> None:
    config = transformers.GPT2Config(vocab_size=60, n_positions=16, n_embd=32, n_layer=1, n_head=4)
    model = transformers.GPT2LMHeadModel(config)
    model.config.name_or_path = "openai-community/gpt2"
    facts = hub_facts(model, None, sentences=False)
    assert facts.auto_class == "AutoModelForCausalLM"
    assert facts.metadata["base_model"] == "openai-community/gpt2"
    assert facts.metadata["pipeline_tag"] == "text-generation"
    assert facts.metadata["library_name"] == "transformers"


def test_formats_that_the_modelling_file_lacks_are_said(tmp_path: Path) -> None:
    model = transformers.BertModel(transformers.BertConfig(vocab_size=64, **SMALL)).eval()
    rule = {"name": "fixed", "ranks": {"re:.*intermediate.dense": {"r1": 2, "r2": 2, "r3": 2}}}
    recipe = {"rule": rule, "formats": "tt_matrix"}
    inputs = {"input_ids": torch.randint(3, 60, (2, 8))}
    made = tenfold.compress(model, inputs, recipe, runtime=tenfold.Runtime(measure=False))
    folder = save_pretrained(made.model, made.plan, tmp_path)
    assert "auto_map" not in json.loads((folder / "config.json").read_text())
    assert "It does not open without tenfold: layers of the format tt_matrix" in (folder / "README.md").read_text()
