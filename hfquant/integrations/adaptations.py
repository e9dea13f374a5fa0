"""What changes in transformers, diffusers and peft once hfquant is imported: a function for each of their modules.

A table in :mod:`hfquant` says after which module's import each function is called. It is called once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from hfquant.integrations import attach, compat, refusals
from hfquant.integrations.apply import attached, inner_configs
from hfquant.integrations.config import METHOD
from hfquant.nn.linear import QuantLinear
from hfquant.nn.modules import quant_modules


# Three modules of hfquant register themselves at their end, so importing them is enough. If such a module is itself
# what imports its library, it is only partly executed when the library asks for it.
def register_transformers() -> None:
    """Register "hfquant" with transformers, if installed; safe to call repeatedly."""
    if find_spec("transformers") is not None:
        import_module("hfquant.integrations.transformers")


def register_diffusers() -> None:
    """Register "hfquant" with diffusers, and with transformers: a PipelineQuantizationConfig asks both libraries."""
    register_transformers()
    import_module("hfquant.integrations.diffusers")


def register_peft() -> None:
    """Register quantized linears with peft's LoRA."""
    import_module("hfquant.integrations.adapters")


def adapt_transformers_models() -> None:
    """Make transformers' models save quantized parts, and refuse to resize quantized embeddings."""
    from transformers.modeling_utils import PreTrainedModel

    register_transformers()
    _save_quantized_parts(PreTrainedModel)
    refusals.refuse_resizing(PreTrainedModel)


def adapt_diffusers_models() -> None:
    """Make diffusers' models save quantized parts, and accept the dtype that a quantized model has."""
    from diffusers.models.modeling_utils import ModelMixin

    compat.accept_own_dtype()
    _save_quantized_parts(ModelMixin)


def _save_quantized_parts(base: type) -> None:
    """Make ``save_pretrained`` of a library's models also save parts of quantized models.

    A float model made from the config of a quantized one is saved without its ``quantization_config``.

    Args:
        base: the library's class of all models.
    """

    @contextmanager
    def saving(model: Any, given: Any) -> Iterator[None]:
        inner = inner_configs(getattr(model, "config", None))
        floats = None if quant_modules(model) else compat.config_of_floats(model, inner, METHOD)
        with attached(model, attach, given), floats or nullcontext():
            yield

    compat.saving_within(base, saving)


def adapt_lora() -> None:
    """Register quantized linears with diffusers' LoRA loaders."""
    compat.register_lora_base(QuantLinear, QuantLinear.effective_weight)


def adapt_ip_adapters() -> None:
    """Load IP adapters into quantized models in the dtype of their outputs."""
    compat.cast_ip_adapters()


def adapt_attention() -> None:
    """Refuse to fuse quantized projections."""
    refusals.refuse_fusing()


def adapt_motion_modules() -> None:
    """Refuse to load or save quantized motion modules on their own."""
    refusals.refuse_copying_motion()


def adapt_free_noise() -> None:
    """Refuse FreeNoise on quantized motion modules."""
    refusals.refuse_free_noise()


def adapt_averages() -> None:
    """Refuse to mix averages of quantized and float models."""
    refusals.refuse_averages()
