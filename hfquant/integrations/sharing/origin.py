"""Origin of a model: its base model's id, the metadata of its card, and its tokenizer or processor."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfquant.hub_ids import hub_id
from hfquant.integrations.sharing.merge import CardError, Generated, read_card
from hfquant.remote_code import remote_code_allowed

CARD_FILE = "README.md"
#: Metadata that the card of a quantized model inherits from its base model's.
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json")
#: Files that models read from beside their weights and do not save with them, by model type: voices.
_EXTRA_FILES = {"qwen2_5_omni": ("spk_dict.pt",)}
#: A folder of weights in the hub's cache.
_IN_CACHE = re.compile(
    r"(?P<cache>.*)[/\\]models--[^/\\]+[/\\]snapshots[/\\](?P<revision>[^/\\]+)(?:[/\\](?P<subfolder>.+))?"
)


@dataclass(frozen=True)
class Origin:
    """What is known about the model that was loaded.

    Attributes:
        base_model: hub id of the full-precision model.
        metadata: metadata of its card, to be inherited.
        quantized_card: card of a quantized model that was loaded and is being saved again.
    """

    base_model: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    quantized_card: str | None = None


def origin_of(thing: Any, base_model: str | None) -> Origin:
    """Return what is known about the model or pipeline that ``thing`` was loaded from.

    Args:
        thing: a model or pipeline; for other objects, nothing is known.
        base_model: hub id, if the user specifies it.
    """
    source = source_of(thing)
    found = (file_of(name, CARD_FILE, **options) for name, options in places(thing))
    path = next(filter(None, found), None)
    try:
        content = path.read_text(encoding="utf-8-sig") if path else ""
        metadata = read_card(content, source).data.to_dict() if content else {}
    except (CardError, UnicodeDecodeError):  # a third-party card: do without it
        content, metadata = "", {}
    if Generated.of(content).sections:
        return Origin(base_model or metadata.get("base_model"), {}, content)
    inherited = {key: metadata[key] for key in _INHERITED if metadata.get(key)}
    return Origin(base_model or hub_id(source), inherited)


def source_of(thing: Any) -> str:
    """Return the folder or hub id that a model or pipeline was loaded from; "" if it was not loaded."""
    config = getattr(thing, "config", None)
    stored = config.get("_name_or_path") if isinstance(config, Mapping) else None
    return str(getattr(thing, "name_or_path", None) or stored or "")


def places(thing: Any, file: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where to look for what was saved with a model: next to its weights, then where its name points to.

    Args:
        thing: a model or pipeline.
        file: a file that its weights were read from; default: that which the quantizer of transformers has noted.

    Yields:
        A folder or hub id, and options of ``from_pretrained``: revision, cache_dir and subfolder.
    """
    name, revision = source_of(thing), getattr(getattr(thing, "config", None), "_commit_hash", None)
    file = file or getattr(getattr(thing, "hf_quantizer", None), "file", None)
    folder = "" if file is None else str(Path(file).parent)
    at: dict[str, Any] = {} if revision is None else {"revision": revision}
    if cached := _IN_CACHE.fullmatch(folder):
        at = {"cache_dir": cached["cache"], "revision": cached["revision"]}
        if cached["subfolder"]:
            yield name, {**at, "subfolder": cached["subfolder"]}
    elif folder:
        yield folder, {}
    if name:
        yield name, at


def file_of(source: str, name: str, subfolder: str = "", **options: Any) -> Path | None:
    """Return a file of a folder or hub repository; None if there is none, or it is currently unavailable.

    Args:
        source: the folder or hub id.
        name: the file.
        subfolder: where in it.
        **options: revision and cache_dir of a repository.
    """
    if source and Path(source).is_dir():
        path = Path(source, subfolder, name)
        return path if path.is_file() else None
    if hub_id(source) is None:
        return None
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, name, subfolder=subfolder or None, **options))
    except OSError:  # includes the client's errors
        return None


def is_own_class(thing: Any) -> bool:
    """Return whether the class of a model, pipeline or component comes from the repository that it was loaded from."""
    return type(thing).__module__.startswith(("transformers_modules.", "diffusers_modules."))


def runs_remote_code(model: Any) -> bool:
    """Return whether the user has agreed to run the code in a model's repository, or already runs its class."""
    return remote_code_allowed() or is_own_class(model)


def save_code(pipeline: Any, folder: Path) -> None:
    """Save the code that a pipeline or its components came with, which diffusers does not save with them.

    Args:
        pipeline: a pipeline.
        folder: where it has been saved.
    """
    parts = {"_class_name": (pipeline, folder)}
    parts |= {name: (part, folder / name) for name, part in pipeline.components.items()}
    own = {name: (type(part), place) for name, (part, place) in parts.items() if is_own_class(part)}
    if not own:
        return
    from diffusers.utils.dynamic_modules_utils import get_relative_import_files

    index_file = folder / "model_index.json"
    index = json.loads(index_file.read_text(encoding="utf-8"))
    for name, (kind, place) in own.items():
        file = inspect.getfile(kind)
        for source in (file, *get_relative_import_files(file)):
            shutil.copy(source, place)
        index[name] = [Path(file).stem, kind.__name__]
    index_file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def save_extra_files(model: Any, folder: Path) -> None:
    """Copy the files that a transformers model cannot be loaded without and does not save, unless they are there."""
    for name in _EXTRA_FILES.get(getattr(model.config, "model_type", ""), ()):
        found = (file_of(source, name, **options) for source, options in places(model))
        if not (folder / name).exists() and (path := next(filter(None, found), None)):
            shutil.copyfile(path, folder / name)


def save_processor(model: Any, folder: Path) -> None:
    """Save the tokenizer or processor that a transformers model came with, unless the folder already has one."""
    from transformers import AutoProcessor

    if any((folder / name).is_file() for name in _PROCESSOR_FILES):
        return
    for source, options in places(model):
        if any(file_of(source, name, **options) for name in _PROCESSOR_FILES):
            # These are transformers' ways of saying that it cannot.
            with suppress(OSError, ValueError, KeyError, TypeError, ImportError):
                trusted = {"trust_remote_code": runs_remote_code(model)}
                AutoProcessor.from_pretrained(source, **trusted, **options).save_pretrained(folder)
                return
