"""The files of a checkpoint to be imported."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hfquant.integrations.checkpoint import CheckpointError


def quantization_section(folder: Path) -> Mapping[str, Any]:
    """Return a checkpoint's quantization config: from config.json, or from the separate file of older programs.

    Raises:
        FileNotFoundError: there is no config.json.
        CheckpointError: the file is damaged, or the checkpoint is not quantized.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json: expected the folder of a checkpoint")
    section = _json(folder / "config.json").get("quantization_config")
    for file, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if section is None and (folder / file).is_file():
            section = {"quant_method": method, **_json(folder / file)}
    if not isinstance(section, dict):
        raise CheckpointError(f"{folder}/config.json has no quantization_config: the checkpoint is not quantized")
    return section


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} is damaged: expected an object")
    return found


def checkpoint_tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint by name: from the files in its index, or else from all its safetensors files.

    Raises:
        FileNotFoundError: there are none, or a file in the index is missing.
        CheckpointError: a file is damaged, or the index names one outside the folder.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(_json(index).get("weight_map", {}).values()))
    else:
        files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no safetensors (pickled weights are not read)")
    tensors: dict[str, Tensor] = {}
    for file in files:
        if file != Path(file).name:
            raise CheckpointError(f"{index} names {file!r}, which is not a file beside it")
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} lacks {file}")
        try:
            with safe_open(folder / file, framework="pt") as opened:
                tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise CheckpointError(f"{folder / file} is damaged: {error}") from None
    return tensors
