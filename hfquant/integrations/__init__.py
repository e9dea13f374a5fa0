"""Where hfquant meets transformers and diffusers. Importing :mod:`hfquant` registers with those that are installed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import nn

from hfquant.calibration.batches import CalibrationError
from hfquant.integrations.apply import quantize_attached
from hfquant.integrations.config import HfQuantConfig
from hfquant.integrations.facts import facts_of
from hfquant.planner import ModelFacts
from hfquant.run import Settings


def library(model: Any) -> str | None:
    """Return "transformers" or "diffusers" where ``model`` is a model of theirs, else None."""
    # A model of a library exists only once that library is imported, so nothing is imported for the question.
    for name, module, base in (
        ("transformers", "transformers.modeling_utils", "PreTrainedModel"),
        ("diffusers", "diffusers.models.modeling_utils", "ModelMixin"),
    ):
        if module in sys.modules and isinstance(model, getattr(sys.modules[module], base)):
            return name
    return None


def model_facts(model: nn.Module) -> ModelFacts:
    """Return what the model's library knows of it; nothing for other modules."""
    return facts_of(model) if library(model) else ModelFacts()


def batches_for(model: nn.Module, data: Any, config: HfQuantConfig) -> Any:
    """Return the calibration data of a config as batches of ``model``'s inputs; None where it needs none."""
    from hfquant.calibration.self_made import SelfSpec

    data = config.calibration if data is None else data
    made_itself = data is None or SelfSpec.of(data) is not None
    return None if made_itself and not config.needs_data else batches_of(model, data)


def batches_of(model: nn.Module, data: Any) -> Any:
    """Return data as batches of ``model``'s inputs: a dataset, file or texts are turned into them.

    Where there is none, or "self", a model of transformers makes its own.
    """
    from hfquant.calibration.self_made import SelfSpec
    from hfquant.calibration.streams import calibration_batches
    from hfquant.integrations.data import diffusers_batches, is_raw, transformers_batches

    made_itself = data is None or SelfSpec.of(data) is not None
    if not made_itself and not is_raw(data):
        return data
    match library(model):
        case "transformers":
            return transformers_batches(model, data)
        case "diffusers":
            return diffusers_batches(data)
        case _ if made_itself:
            raise CalibrationError(
                f"{type(model).__name__} needs calibration data, and only models of transformers and "
                "pipelines of diffusers make their own: pass batches of its inputs"
            )
        case _:
            return calibration_batches(data)


def quantize_model(
    model: nn.Module, loader: Any, config: HfQuantConfig, settings: Settings | None = None
) -> Callable[[], None]:
    """Quantize ``model`` in place, and set on a library's model what saving and reloading it needs.

    Returns:
        A function that undoes it.

    Raises:
        ValueError: ``model`` has adapters.
    """
    if adapters := getattr(model, "peft_config", None):
        raise ValueError(
            f"{type(model).__name__} has adapters ({', '.join(adapters)}), whose own linears would be quantized as "
            "well: merge or unload them, or quantize first and load them then"
        )
    return quantize_attached(model, loader, config, model_facts(model), attach, settings)


def attach(model: nn.Module, config: HfQuantConfig) -> None:
    """Set on a quantized Hugging Face model what saving and reloading it needs; other models are left alone.

    Args:
        model: quantized in place already.
        config: the model's own, plan included.
    """
    match library(model):
        case "transformers":
            from hfquant.integrations.transformers import attach as attach_transformers

            attach_transformers(model, config)
        case "diffusers":
            from hfquant.integrations.diffusers import attach as attach_diffusers

            attach_diffusers(model, config)


# These modules register themselves at their end, and importing one is all that is done for it: where it is itself
# what imports its library, it is half executed when the library calls for it.
def register_transformers() -> None:
    """Make "hfquant" known to transformers, where it is installed; safe to call again."""
    if find_spec("transformers") is not None:
        import_module("hfquant.integrations.transformers")


def register_diffusers() -> None:
    """Make "hfquant" known to diffusers, where it is installed; safe to call again."""
    if find_spec("diffusers") is not None:
        import_module("hfquant.integrations.diffusers")


def register_peft() -> None:
    """Make quantized linears known to peft's LoRA. Called once peft is imported."""
    import_module("hfquant.integrations.adapters")


def register_diffusers_lora() -> None:
    """Make quantized linears known to diffusers' LoRA loaders. Called once these are imported."""
    from hfquant.integrations.compat import register_lora_base
    from hfquant.nn.linear import QuantLinear

    register_lora_base(QuantLinear, QuantLinear.effective_weight)
