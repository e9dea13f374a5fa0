"""The names of transformers, diffusers and accelerate that are not public and that this package needs, in one place.

``tests/smoke/test_compat.py`` checks each against the installed versions, the oldest allowed among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

with suppress(ImportError):  # either library may be absent
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, rename_source_key
    from transformers.integrations.accelerate import load_offloaded_parameter

__all__ = [
    "ConversionOps",
    "WeightConverter",
    "apply_gate",
    "declares_experts",
    "drop_quantization_config",
    "is_marked_initialized",
    "keep_in_fp32",
    "load_offloaded_parameter",
    "mark_initialized",
    "names_in_model",
    "save_as_named",
    "set_quantized",
]


def keep_in_fp32(model: nn.Module) -> list[str]:
    """Return the keys of modules that either library keeps in float32."""
    lists = (getattr(model, f"_keep_in_fp32_modules{strict}", None) for strict in ("", "_strict"))
    return [key for keys in lists for key in keys or ()]


def declares_experts(module: nn.Module) -> bool:
    """Return whether a module is of a class that transformers' ``use_experts_implementation`` decorates."""
    return hasattr(module, "_apply_gate") and hasattr(module, "has_gate") and hasattr(module, "is_transposed")


def apply_gate(kind: type, experts: nn.Module, gate_up: Any) -> Any:
    """Return what class ``kind`` of transformers makes of both halves, with the attributes of ``experts``."""
    return kind._apply_gate(experts, gate_up)  # type: ignore[attr-defined]


def mark_initialized(holder: Any) -> None:
    """Tell transformers that a module, parameter or buffer needs no random initialization."""
    holder._is_hf_initialized = True


def is_marked_initialized(tensor: Any) -> bool:
    """Return whether transformers has loaded a tensor, or was told that it is initialized."""
    return bool(getattr(tensor, "_is_hf_initialized", False))


def set_quantized(model: PreTrainedModel, quantized: bool) -> None:
    """Say in a transformers model's config whether it is quantized."""
    model.config._is_quantized = quantized


def drop_quantization_config(model: Any) -> None:
    """Take the quantization config out of a diffusers model's config, which is frozen."""
    from diffusers.configuration_utils import FrozenDict

    model._internal_dict = FrozenDict({k: v for k, v in model.config.items() if k != "quantization_config"})


def save_as_named(model: PreTrainedModel) -> None:
    """Have transformers save a model's tensors under the model's own names; plain renamings stay.

    Some architectures' original checkpoints have linears fused or split otherwise, which cannot be done to codes.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    if any(isinstance(c, WeightConverter) for c in conversions):
        model._weight_conversions = [c for c in conversions if type(c) is WeightRenaming]


def names_in_model(model: PreTrainedModel, keys: Sequence[str]) -> set[str]:
    """Return what transformers calls a checkpoint's tensors once they are in ``model``."""
    renamings = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightRenaming)]
    own = model.state_dict()
    return {rename_source_key(key, renamings, [], model.base_model_prefix, own)[0] for key in keys}
