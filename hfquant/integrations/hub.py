"""Load a pipeline or a model by name, whichever of the two it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

import hfquant  # noqa: F401 (registers)
from hfquant.hub_errors import hub_errors
from hfquant.integrations.checkpoint import CheckpointError
from hfquant.remote_code import remote_code_allowed, remote_code_errors

PIPELINE_FILE, MODEL_FILE = "model_index.json", "config.json"


def load(name: str, dtype: str | None = None, device: str | None = None) -> Any:
    """Load a diffusers pipeline, or a transformers model by the class that saved it.

    Code that comes with it runs only if it is allowed (:mod:`hfquant.remote_code`).

    Args:
        name: local folder or hub id. If it has a model_index.json, it is a pipeline, including those of
            :mod:`hfquant.demo`.
        dtype: floating-point dtype by name ("bfloat16"); default: the library's.
        device: device to move it to; default: the library's.

    Returns:
        The pipeline, or the model in eval mode.

    Raises:
        FileNotFoundError: no such folder, or one without a pipeline or a model.
        ValueError: an unknown dtype, a pipeline class that diffusers lacks, or code that is not allowed to run.
        OSError: the hub cannot provide it; the message says why (:mod:`hfquant.hub_errors`).
        CheckpointError: a safetensors file is damaged.
    """
    try:
        with hub_errors(name), remote_code_errors(name):
            return _load(name, dtype, device)
    except SafetensorError as error:
        file = next(filter(_is_damaged, sorted(Path(name).rglob("*.safetensors"))), name)
        raise CheckpointError(f"{file} is damaged: {error}; fetch it again") from error


def _is_damaged(file: Path) -> bool:
    try:
        with safe_open(file, "pt"):
            return False
    except SafetensorError:
        return True


def _load(name: str, dtype: str | None, device: str | None) -> Any:
    pipeline = is_pipeline_name(name)
    options: dict[str, Any] = {"trust_remote_code": remote_code_allowed()}
    if dtype is not None:
        options["torch_dtype" if pipeline else "dtype"] = floating(dtype)
    if pipeline:
        import diffusers

        import hfquant.demo  # noqa: F401  # diffusers finds a pipeline's class once its module is imported

        kind = diffusers.DiffusionPipeline.load_config(name).get("_class_name")
        if isinstance(kind, str) and not hasattr(diffusers, kind):
            raise ValueError(f"{name} is a {kind}, which diffusers {diffusers.__version__} does not have.")
        loaded = diffusers.DiffusionPipeline.from_pretrained(name, **options)
    else:
        loaded = model_class(transformers_config(name)).from_pretrained(name, **options).eval()
    return loaded if device is None else loaded.to(device)


def is_pipeline_name(name: str) -> bool:
    """Return whether a folder or hub repository holds a pipeline; fetches one small file of a repository.

    Raises:
        FileNotFoundError: no such folder, or one without a pipeline or a model.
        ValueError: a folder of a single component of a pipeline.
        OSError: any error of huggingface_hub's client.
    """
    folder = Path(name)
    if folder.is_dir():
        if (folder / PIPELINE_FILE).is_file():
            return True
        if not (folder / MODEL_FILE).is_file():
            raise FileNotFoundError(_no_model(name))
        _check_whole(folder)
        return False
    # A hub id is at most "owner/name".
    if folder.is_absolute() or name.startswith((".", "~")) or len(folder.parts) > 2 or folder.exists():
        raise FileNotFoundError(f"{name} is not a folder.")

    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        hf_hub_download(name, PIPELINE_FILE)
    except LocalEntryNotFoundError:  # the hub cannot be reached
        if not isinstance(try_to_load_from_cache(name, MODEL_FILE), str):
            raise
        return False
    except EntryNotFoundError:
        try:
            hf_hub_download(name, MODEL_FILE)
        except EntryNotFoundError:
            raise FileNotFoundError(_no_model(name)) from None
        return False
    return True


def _check_whole(folder: Path) -> None:
    """Raise ValueError if a folder holds a single component of a diffusers pipeline."""
    try:
        config = json.loads((folder / MODEL_FILE).read_text(encoding="utf-8"))
    except ValueError:  # transformers says what is wrong with it
        return
    if isinstance(config, dict) and "_class_name" in config and "model_type" not in config:
        kind, whole, component = config["_class_name"], folder.absolute().parent, folder.absolute().name
        where = f", {whole}," if (whole / PIPELINE_FILE).is_file() else ""
        raise ValueError(
            f"{folder} is a {kind}, one component of a pipeline: pass the folder of the pipeline{where} and, to a "
            f"command that has the option, --component {component}"
        )


def _no_model(name: str) -> str:
    return f"{name} holds no model: it has neither {PIPELINE_FILE} nor {MODEL_FILE}."


def transformers_config(name: str, **options: Any) -> Any:
    """Return the config of a transformers model, which may be of a class that comes with the model."""
    import transformers

    return transformers.AutoConfig.from_pretrained(name, trust_remote_code=remote_code_allowed(), **options)


def model_class(config: Any) -> Any:
    """Return the class that saved a transformers model, or the auto class that loads it if it comes with the model.

    If both transformers and the model's own code define it, the latter's is used where that code may run.
    """
    import transformers

    names = config.architectures or ()
    known = next((found for name in names if (found := getattr(transformers, name, None))), None)
    auto_map = getattr(config, "auto_map", None) or {}
    own = [auto for auto in auto_map if auto.startswith("AutoModel")]
    fitting = next((auto for auto in own if auto_map[auto].rpartition(".")[2] in names), None)
    if known is not None and not (fitting and remote_code_allowed()):
        return known
    return getattr(transformers, fitting or next(iter(own), "AutoModel"))


def floating(name: str) -> torch.dtype:
    """Return a floating-point dtype by its name.

    Raises:
        ValueError: there is no such dtype.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype: {name!r} is not a floating-point dtype of torch, such as float32 or bfloat16.")
    return dtype
