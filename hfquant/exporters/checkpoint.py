"""Files of an exported checkpoint: the converted layers, plus everything that stays in float."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import align_module_device
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from hfquant.console import counted
from hfquant.integrations import library
from hfquant.integrations.compat import drop_needs_hfquant, stored_names
from hfquant.integrations.sharing.origin import save_extra_files, save_processor
from hfquant.nn.experts import QuantExperts
from hfquant.nn.linear import QuantLinear


class ExportError(ValueError):
    """A model that a format cannot express. The message names the layers and suggests what to do."""


@dataclass(frozen=True)
class Converted:
    """A model's quantized linears, converted to another format.

    Attributes:
        tensors: tensors of the quantized linears, by full name.
        quantization_config: the format's section of config.json.
        of_experts: tensors of quantized experts, by their names in the checkpoint, which match no module of the model.
    """

    tensors: Mapping[str, Tensor]
    quantization_config: Mapping[str, Any]
    of_experts: Mapping[str, Tensor] = field(default_factory=dict)


def refuse(problems: Mapping[str, str], format: str, requantized: bool) -> None:
    """Raise if there are any problems, listing the layers.

    Args:
        problems: layer name -> what the format lacks.
        format: name of the format.
        requantized: whether requantizing was already tried.

    Raises:
        ExportError: lists the layers under each reason.
    """
    if not problems:
        return
    reasons: dict[str, list[str]] = {}
    for name, why in problems.items():
        reasons.setdefault(why, []).append(name)
    lines = [f"  {why}: {', '.join(map(repr, names))}" for why, names in reasons.items()]
    advice = (
        "quantize these layers differently, or exclude them"
        if requantized
        else 'quantize these layers differently (smoothing with opt: {"fold": True}), or pass requantize=True to round '
        "them again on a plain grid"
    )
    what = counted(len(problems), "layer")
    raise ExportError(f"{format} cannot express {what}:\n" + "\n".join(lines) + f"\n{advice}")


def must_be_of(model: nn.Module, wanted: str, format: str) -> None:
    """Raise ExportError unless ``model`` belongs to the library that reads ``format``."""
    if library(model) != wanted:
        raise ExportError(f"{format} is a format for {wanted} models, and {type(model).__name__} is not one")


def write(model: nn.Module, converted: Converted, folder: Path, max_shard_size: int | str) -> None:
    """Write config, weights and a model's tokenizer or processor; the folder appears only once it is complete.

    Args:
        model: a model of transformers or diffusers.
        converted: its quantized linears.
        folder: must not exist, or be empty.
        max_shard_size: maximum size of a file, in bytes or like "5GB".
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        made.chmod(0o755)
        state = {**float_tensors(model), **converted.tensors}
        if library(model) == "transformers":
            _write_transformers_config(model, converted.quantization_config, made)
            save_processor(model, made)
            save_extra_files(model, made)
            state = {**stored_names(model, state), **converted.of_experts}
            pattern = "model{suffix}.safetensors"
        else:
            _write_diffusers_config(model, converted.quantization_config, made)
            pattern = "diffusion_pytorch_model{suffix}.safetensors"
        save_torch_state_dict(
            state, made, filename_pattern=pattern, max_shard_size=max_shard_size, metadata={"format": "pt"}
        )
        made.replace(folder)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def float_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all tensors except those of quantized linears and experts, each tied tensor only once."""
    tied: Collection[str] = getattr(model, "all_tied_weights_keys", None) or ()
    found: dict[str, Tensor] = {}
    for key in model.state_dict():
        owner, _, name = key.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, QuantLinear) or key in tied:
            continue
        if isinstance(module, QuantExperts) and name in module.specs() and not name.endswith("_bias"):
            continue
        # Fetch offloaded weights temporarily.
        with align_module_device(module):
            found[key] = getattr(module, name).detach().cpu()
    return found


def _write_transformers_config(model: Any, quantization_config: Mapping[str, Any], folder: Path) -> None:
    from transformers.dynamic_module_utils import custom_object_save

    config = copy.deepcopy(model.config)
    drop_needs_hfquant(config)
    config.quantization_config = dict(quantization_config)
    config.architectures, config.dtype = [type(model).__name__], str(model.dtype).removeprefix("torch.")
    if model.is_remote_code():
        custom_object_save(model, folder, config=config)
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _write_diffusers_config(model: Any, quantization_config: Mapping[str, Any], folder: Path) -> None:
    config = json.loads(model.to_json_string()) | {"quantization_config": dict(quantization_config)}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
