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
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

__all__ = [
    "NEEDS_HFQUANT",
    "ConversionOps",
    "allow_needs_hfquant",
    "drop_needs_hfquant",
    "drop_quantization_config",
    "is_marked_initialized",
    "keep_in_fp32",
    "load_offloaded_parameter",
    "mark_initialized",
    "names_in_model",
    "save_as_named",
    "set_quantized",
]


#: The implementation of experts that config.json of a quantized transformers model asks for.
#:
#: transformers merely warns of a quantization method that it does not know and goes on, but at an implementation that
#: is not registered it stops, before any weight is read, and says its name. So who has not imported hfquant is told
#: what to do. It asks models without experts as well.
NEEDS_HFQUANT = "hfquant: pip install hfquant, and import hfquant before loading"


def keep_in_fp32(model: nn.Module) -> list[str]:
    """Return the keys of modules that either library keeps in float32."""
    lists = (getattr(model, f"_keep_in_fp32_modules{strict}", None) for strict in ("", "_strict"))
    return [key for keys in lists for key in keys or ()]


def mark_initialized(holder: Any) -> None:
    """Tell transformers that a module, parameter or buffer needs no random initialization."""
    holder._is_hf_initialized = True


def is_marked_initialized(tensor: Any) -> bool:
    """Return whether transformers has loaded a tensor, or was told that it is initialized."""
    return bool(getattr(tensor, "_is_hf_initialized", False))


def set_quantized(model: PreTrainedModel, quantized: bool) -> None:
    """Say in a transformers model's config whether it is quantized, and that its checkpoints need hfquant."""
    model.config._is_quantized = quantized
    # What a config takes from its file under this name it keeps under another, so what is set here only gets saved.
    if quantized:
        model.config.experts_implementation = NEEDS_HFQUANT
    elif "experts_implementation" in vars(model.config):
        del model.config.experts_implementation


def drop_needs_hfquant(config: Any) -> None:
    """Leave the choice of experts to the library in a config read from a quantized checkpoint."""
    if config._experts_implementation == NEEDS_HFQUANT:
        config._experts_implementation = None


def allow_needs_hfquant() -> None:
    """Let float models be made from the config of a quantized one; their experts run as by default."""
    ALL_EXPERTS_FUNCTIONS.register(NEEDS_HFQUANT, ALL_EXPERTS_FUNCTIONS["grouped_mm"])


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
