"""What a model card for the Hub says beside plan and record: metadata, and how the folder is opened."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tenfold.checkpoint.remote_code import auto_classes, reason_for_none
from tenfold.errors import FileError
from tenfold.files import read_text
from tenfold.surgery import NOTE

TAGS = ("tenfold", "low-rank", "model-compression")
INHERITED = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag")  # from the base's card
_TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForObjectDetection": "object-detection",
    "AutoModelForSemanticSegmentation": "image-segmentation",
    "AutoModelForAudioClassification": "audio-classification",
    "AutoModelForCTC": "automatic-speech-recognition",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
}
_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class HubFacts:
    """Of a folder with a model of transformers.

    Attributes:
        metadata: the YAML at the head of the card, by which the Hub lists and finds models.
        auto_class: the Auto class that gives the class that was saved; its own name where there is none.
        closed: why the folder does not open without tenfold; empty where it does.
        sentences: whether it opens as a SentenceTransformer as well.
        stock: whether transformers opens it without any code of its own.
    """

    metadata: dict[str, Any] = field(default_factory=dict)
    auto_class: str = "AutoModel"
    closed: str = ""
    sentences: bool = False
    stock: bool = False


def hub_facts(model: Any, source: Path | None, *, sentences: bool = False, stock: bool = False) -> HubFacts:
    """Return what a card says of a model of transformers.

    License, language and data of the base model are taken from the card in its own folder, if that is known here;
    nothing is asked of the Hub.

    Args:
        model: compressed.
        source: the folder that it came from; see ``source_folder``.
        sentences: whether it is part of a SentenceTransformer.
        stock: whether its config is that of a stock model.
    """
    autos = [name for name, cls in auto_classes(model.config).items() if cls is type(model)]
    auto = min(autos, key=lambda name: (name == "AutoModelForPreTraining", name), default=type(model).__name__)
    base = {} if source is None else _front_matter(source / "README.md")
    named = str(getattr(model.config, "name_or_path", None) or "")
    metadata: dict[str, Any] = {"library_name": "sentence-transformers" if sentences else "transformers"}
    if NOTE in _listed(base.get("tags")):  # it was compressed before: what it says of its base still holds
        metadata |= {"base_model": base["base_model"]} if "base_model" in base else {}
    elif _ID.fullmatch(named) and not Path(named).exists():
        metadata["base_model"] = named
    if auto in _TASKS:
        metadata["pipeline_tag"] = _TASKS[auto]
    metadata |= {name: base[name] for name in INHERITED if base.get(name)}
    metadata["tags"] = list(dict.fromkeys([*_listed(base.get("tags")), *TAGS]))
    note = None if stock else getattr(model.config, NOTE, None)
    closed = "" if note is None else reason_for_none(model, note)
    return HubFacts(metadata, auto, closed, sentences, stock)


def source_folder(model: Any) -> Path | None:
    """Return the folder from which transformers loaded a model, that in the Hub's cache included; None if unknown."""
    named = str(getattr(model.config, "name_or_path", None) or "")
    if not named:
        return None
    if Path(named).is_dir():
        return Path(named)
    try:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(named, "config.json")
    except (ImportError, ValueError):  # no such package, or no id
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _front_matter(card: Path) -> dict[str, Any]:
    """Return the YAML at the head of a card; empty where there is none that can be read."""
    try:
        parts = read_text(card, "a model card").split("---\n", 2)
        found = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except (FileError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _listed(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else []
