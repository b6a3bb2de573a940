"""The task of causal language models: sequences, perplexity, what is read from where."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tenfold.errors import CheckpointError, DataError, UnknownNameError
from tenfold.tasks import Task, load_task
from tenfold.tasks.perplexity import perplexity
from tenfold.tasks.text_files import TokenBatches, packed
from tests.language import VOCABULARY, folder, small_llama, text_folder, texts, tokenizer

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("lm") / "model")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return text_folder(tmp_path / "texts")


def exact(model: nn.Module, ids: Tensor) -> float:
    """Return the perplexity by its definition, one token after the other."""
    losses = []
    with torch.no_grad():
        for row in ids:
            for place in range(1, len(row)):
                logits = model(input_ids=row[None, :place]).logits[0, -1].double()
                losses.append(float(torch.logsumexp(logits, 0) - logits[row[place]]))
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("kind", ["plain", "tied", "capped", "gpt2"])
def test_perplexity_is_that_of_its_definition(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tenfold.tasks.perplexity._CHUNK", 5 * VOCABULARY)  # several chunks, the last one smaller
    model = made(kind)
    ids = torch.randint(VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))
    batches = TokenBatches(ids, 2, VOCABULARY)
    assert perplexity(model, batches) == pytest.approx(exact(model, ids), rel=1e-4)


def made(kind: str) -> Any:
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": VOCABULARY}
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, initializer_range=0.3)).eval()
    model = small_llama(tie_word_embeddings=kind == "tied")
    if kind == "capped":  # as Gemma 2 does after its head: the head's outputs are not the logits
        forward = model.forward

        def capped(*args: Any, **kwargs: Any) -> Any:
            found = forward(*args, **kwargs)
            found.logits = 2 * torch.tanh(found.logits / 2)
            return found

        model.forward = capped
    return model


@pytest.mark.parametrize("kind", ["plain", "biased", "factorized", "hooked"])
def test_logits_of_a_batch_never_exist_at_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tenfold.tasks.perplexity._CHUNK", 5 * VOCABULARY)
    monkeypatch.setattr("tenfold.tasks.perplexity._TILE", 7)  # the last is narrower
    model, sizes = small_llama(), []
    head, ids = model.lm_head, torch.randint(VOCABULARY, (4, 16))
    if kind == "biased":
        model.lm_head = nn.Linear(head.in_features, VOCABULARY)
    if kind == "factorized":
        model.lm_head = nn.Sequential(nn.Linear(head.in_features, 4), nn.Linear(4, VOCABULARY))
    if kind == "hooked":  # what it returns is not what its weight alone would give
        head.register_forward_hook(lambda _module, _args, output: 3 * output)

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            if "mm" in str(func) and found.shape[-1] == VOCABULARY:
                sizes.append(found.numel())
            return found

    with Sizes():
        found = perplexity(model, TokenBatches(ids, 4, VOCABULARY))
    assert max(sizes) <= (16 if kind == "hooked" else 8) * VOCABULARY  # eight tokens to see what the head does
    assert found == pytest.approx(exact(model, ids), rel=1e-4)
    rows = TokenBatches(torch.zeros(40, 512, dtype=torch.long), 100, 262_144).rows
    assert rows == 2


def test_an_endless_perplexity_is_infinite_not_an_error() -> None:
    class Sure(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return 1e4 * F.one_hot(torch.zeros_like(input_ids), 4).float()

    assert perplexity(Sure(), [{"input_ids": torch.tensor([[0, 1, 2]])}]) == math.inf


def test_texts_are_packed_in_order_with_a_start_where_there_is_one() -> None:
    own = tokenizer()
    ids = packed(["ba be", "bi bo da"], own, 4, "here")
    words = [own.convert_ids_to_tokens(row) for row in ids.tolist()]
    assert words == [["<s>", "ba", "be", "\n"], ["<s>", "bi", "bo", "da"]]
    bare = packed(["ba be", "bi bo da"], tokenizer(start=False), 4, "here")
    assert [own.convert_ids_to_tokens(row) for row in bare.tolist()] == [["ba", "be", "\n", "bi"]]
    with pytest.raises(DataError, match="here has 3 tokens: too few for a sequence of 16"):
        packed(["ba be"], own, 16, "here")


def test_parts_of_the_texts_have_nothing_in_common(model_folder: Path, data: Path) -> None:
    task = load_task(f"lm:{model_folder}@16", data=data / "train.txt")
    assert isinstance(task, Task)
    parts = [task._files.lines(part) for part in ("train", "validation", "test")]  # type: ignore[attr-defined]
    assert [len(part) for part in parts] == [80, 10, 10]
    assert len({line for part in parts for line in part}) == 100
    whole = load_task(f"lm:{model_folder}@16", data=data)
    assert [len(whole._files.lines(part)) for part in ("train", "validation", "test")] == [90, 10, 20]  # type: ignore[attr-defined]


def test_a_model_has_inputs_a_score_and_a_score_elsewhere(model_folder: Path, data: Path) -> None:
    task = load_task(f"lm:{model_folder}@16", data=data)
    model = task.dense()
    assert (task.scored, task.labelled, task.metric.better) == (True, False, "lower")
    assert task.example_inputs(3)["input_ids"].shape == (3, 16)
    batches = list(task.calibration_batches(5, batch_size=2, seed=1))
    assert [tuple(b["input_ids"].shape) for b in batches] == [(2, 16), (2, 16), (1, 16)]
    again, other = (task.calibration_batches(5, batch_size=2, seed=s) for s in (1, 2))
    assert torch.equal(next(iter(again))["input_ids"], batches[0]["input_ids"])
    assert not torch.equal(next(iter(other))["input_ids"], batches[0]["input_ids"])
    own = packed((data / "test.txt").read_text().splitlines(), tokenizer(), 16, "")
    assert task.evaluate(model) == pytest.approx(exact(model, own), rel=1e-4)
    assert task.evaluate(model, limit=2) == pytest.approx(exact(model, own[:2]), rel=1e-4)
    far = packed((data / "elsewhere.txt").read_text().splitlines(), tokenizer(), 16, "")
    assert task.scores_elsewhere(model) == {"elsewhere": pytest.approx(exact(model, far), rel=1e-4)}
    inputs, targets = next(iter(task.validation_batches(batch_size=4)))
    assert torch.equal(inputs["input_ids"][:, 1:], targets)


def test_what_is_missing_is_said_in_one_line(model_folder: Path, data: Path, tmp_path: Path) -> None:
    task = load_task(f"lm:{model_folder}")
    assert task.calibration_size(0) == 0
    with pytest.raises(DataError, match="give --data FILE"):
        task.evaluate(task.build())
    with pytest.raises(DataError, match="label-free"):
        task.train_batches(0, batch_size=1, seed=0)
    with pytest.raises(UnknownNameError, match="lm:FOLDER"):
        load_task("lm").build()
    with pytest.raises(UnknownNameError, match="2 to 64 tokens, not 65"):
        load_task(f"lm:{model_folder}@65").example_inputs()
    with pytest.raises(DataError, match=r"has no train\.txt"):
        load_task(f"lm:{model_folder}", data=tmp_path).calibration_size(0)
    few = tmp_path / "few.txt"
    few.write_text(texts(9))
    with pytest.raises(DataError, match="9 lines of text"):
        load_task(f"lm:{model_folder}", data=few).calibration_size(0)
    with pytest.raises(DataError, match="sequences of 16"):
        load_task(f"lm:{model_folder}@16", data=data).calibration_batches(10_000, batch_size=1, seed=0)
    with pytest.raises(DataError, match="unknown split"):
        load_task(f"lm:{model_folder}", data=data).evaluate(task.build(), split="dev")


def test_models_that_do_not_predict_the_next_token_are_refused(tmp_path: Path) -> None:
    config = transformers.BertConfig(vocab_size=20, hidden_size=8, num_attention_heads=1, num_hidden_layers=1)
    transformers.BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="BertModel, which predicts no next token"):
        load_task(f"lm:{tmp_path}").build()


def test_without_a_tokenizer_there_are_no_texts(tmp_path: Path, data: Path) -> None:
    small_llama().save_pretrained(tmp_path / "bare")
    with pytest.raises(DataError, match="has no tokenizer"):
        load_task(f"lm:{tmp_path / 'bare'}@16", data=data).calibration_size(0)


def test_files_in_gguf_need_their_package_and_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="2 files in GGUF: name one"):
        load_task(f"lm:{tmp_path}").build()
    with pytest.raises(CheckpointError, match=r"there is no file .*c\.gguf"):
        load_task(f"lm:{tmp_path / 'c.gguf'}").build()
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(Exception, match=re.escape("tenfold[gguf]")):
        load_task(f"lm:{tmp_path / 'a.gguf'}").build()


def test_a_checkpoint_is_its_own_task(model_folder: Path) -> None:
    cls = type(load_task(f"lm:{model_folder}"))
    assert cls.recorded("lm:x@32", model_folder) == f"lm:{model_folder}@32"
    assert cls.recorded("lm:x", model_folder) == f"lm:{model_folder}"
