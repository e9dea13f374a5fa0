"""Where hfquant meets transformers and diffusers. Importing :mod:`hfquant` registers with both."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn


def attach(model: nn.Module, config: Any) -> None:
    """Set on a quantized Hugging Face model what saving and reloading it needs; other models are left alone.

    Args:
        model: quantized in place already.
        config: the model's own :class:`~hfquant.HfQuantConfig`, plan included.
    """
    # A model of a library exists only once that library is imported, so nothing is imported for the question.
    transformers, diffusers = (
        sys.modules.get(f"{name}.modeling_utils") for name in ("transformers", "diffusers.models")
    )
    if transformers is not None and isinstance(model, transformers.PreTrainedModel):
        from hfquant.integrations.transformers import attach as attach_transformers

        attach_transformers(model, config)
    elif diffusers is not None and isinstance(model, diffusers.ModelMixin):
        from hfquant.integrations.diffusers import attach as attach_diffusers

        attach_diffusers(model, config)


def register() -> None:
    """Make "hfquant" known to transformers and diffusers; safe to call again."""
    from transformers.quantizers import auto as transformers_auto

    from hfquant.integrations.config import METHOD, HfQuantConfig
    from hfquant.integrations.transformers import HfQuantTransformersQuantizer

    if METHOD not in transformers_auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        transformers_auto.register_quantization_config(METHOD)(HfQuantConfig)
        transformers_auto.register_quantizer(METHOD)(HfQuantTransformersQuantizer)

    from diffusers.quantizers import auto as diffusers_auto

    from hfquant.integrations.diffusers import HfQuantDiffusersQuantizer

    # diffusers has no public registration.
    diffusers_auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, HfQuantConfig)
    diffusers_auto.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, HfQuantDiffusersQuantizer)
