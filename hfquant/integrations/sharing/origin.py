"""Where a model came from: its base model's id, what it says of itself, and the tokenizer or processor beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfquant.integrations.sharing.merge import CardError, Generated, read_card

CARD_FILE = "README.md"
#: What the card of a quantized model takes over from its base model's.
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json")
_SNAPSHOT = re.compile(r"models--((?:(?!--)[^/\\])+(?:--(?:(?!--)[^/\\])+)?)[/\\]snapshots[/\\]")


@dataclass(frozen=True)
class Origin:
    """What is known of the model that was loaded.

    Attributes:
        base_model: hub id of the full-precision model.
        metadata: of its card, to be taken over.
        quantized_card: card of the quantized model that was loaded and is saved again.
    """

    base_model: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    quantized_card: str | None = None


def origin_of(thing: Any, base_model: str | None) -> Origin:
    """Return what is known of the model or pipeline that ``thing`` was loaded from.

    Args:
        thing: a model or pipeline; of others nothing is known.
        base_model: hub id, where the user says it.
    """
    source = source_of(thing)
    path = file_of(source, CARD_FILE)
    try:
        content = path.read_text(encoding="utf-8-sig") if path else ""
        metadata = read_card(content, source).data.to_dict() if content else {}
    except (CardError, UnicodeDecodeError):  # somebody else's card: do without
        content, metadata = "", {}
    if Generated.of(content).sections:
        return Origin(base_model or metadata.get("base_model"), {}, content)
    inherited = {key: metadata[key] for key in _INHERITED if metadata.get(key)}
    return Origin(base_model or hub_id(source), inherited)


def source_of(thing: Any) -> str:
    """Return the folder or hub id that a model or pipeline was loaded from; "" where it was not."""
    config = getattr(thing, "config", None)
    stored = config.get("_name_or_path") if isinstance(config, Mapping) else None
    return str(getattr(thing, "name_or_path", None) or stored or "")


def hub_id(source: str) -> str | None:
    """Return the id of a repository, also of its folder in the cache; None for other folders."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if cached := _SNAPSHOT.search(source):
        return cached[1].replace("--", "/", 1)
    if not source or Path(source).exists() or Path(source).is_absolute():
        return None
    try:
        validate_repo_id(source)
    except HFValidationError:
        return None
    return source


def file_of(source: str, name: str) -> Path | None:
    """Return a file of a folder or of a repository on the hub; None where there is none, or it cannot be had now."""
    if not source:
        return None
    if Path(source).is_dir():
        path = Path(source, name)
        return path if path.is_file() else None
    if hub_id(source) is None:
        return None
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, name))
    except OSError:  # the client's errors are
        return None


def save_processor(model: Any, folder: Path) -> None:
    """Save the tokenizer or processor that a transformers model came with, unless one is in the folder already."""
    from transformers import AutoProcessor

    source = source_of(model)
    if any((folder / name).is_file() for name in _PROCESSOR_FILES):
        return
    if not any(file_of(source, name) for name in _PROCESSOR_FILES):
        return
    try:
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError):  # the ways transformers says that it cannot
        return
    processor.save_pretrained(folder)
