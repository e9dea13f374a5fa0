"""Integration with transformers and diffusers. Importing :mod:`hfquant` registers it with those that are installed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from hfquant.calibration.batches import CalibrationError
from hfquant.denoisers import refuse_cached
from hfquant.integrations.apply import quantize_attached
from hfquant.integrations.config import HfQuantConfig
from hfquant.integrations.facts import facts_of
from hfquant.planner import ModelFacts
from hfquant.presets import PRESETS
from hfquant.run import Settings


def library(model: Any) -> str | None:
    """Return "transformers" or "diffusers" if ``model`` is a model of that library, else None."""
    # A library's models exist only once the library is imported, so this check imports nothing.
    for name, module, base in (
        ("transformers", "transformers.modeling_utils", "PreTrainedModel"),
        ("diffusers", "diffusers.models.modeling_utils", "ModelMixin"),
    ):
        if module in sys.modules and isinstance(model, getattr(sys.modules[module], base)):
            return name
    return None


def model_facts(model: nn.Module) -> ModelFacts:
    """Return what the model's library knows about it; nothing for other modules."""
    return facts_of(model) if library(model) else ModelFacts()


def batches_for(model: nn.Module, data: Any, config: HfQuantConfig) -> Any:
    """Return the calibration data of a config as batches of ``model``'s inputs; None if it needs none."""
    from hfquant.calibration.self_made import SelfSpec

    data = config.calibration if data is None else data
    made_itself = data is None or SelfSpec.of(data) is not None
    return None if made_itself and not config.needs_data else batches_of(model, data)


def batches_of(model: nn.Module, data: Any) -> Any:
    """Return data as batches of ``model``'s inputs, converting datasets, files and texts.

    If there is no data, or it is "self", a transformers model generates its own.
    """
    from hfquant.calibration.self_made import SelfSpec
    from hfquant.calibration.streams import calibration_batches
    from hfquant.integrations.data import diffusers_batches, is_raw, transformers_batches

    made_itself = data is None or SelfSpec.of(data) is not None
    if isinstance(data, str) and data in PRESETS and not os.path.exists(data):
        raise CalibrationError(f"{data} is the name of a preset: pass it as config; calibration data come before it")
    if not made_itself and not is_raw(data) and not (isinstance(data, list) and library(model) == "transformers"):
        # A path that is not raw data is that of a calibration set.
        return calibration_batches(data) if isinstance(data, (str, os.PathLike)) else data
    match library(model):
        case "transformers":
            return transformers_batches(model, data)
        case "diffusers":
            return diffusers_batches(data)
        case _ if made_itself:
            raise CalibrationError(
                f"{type(model).__name__} needs calibration data, and only transformers models and "
                "diffusers pipelines can generate their own: pass batches of its inputs"
            )
        case _:
            return calibration_batches(data)


def quantize_model(
    model: nn.Module, loader: Any, config: HfQuantConfig, settings: Settings | None = None
) -> Callable[[], None]:
    """Quantize ``model`` in place and, for a library's model, attach what saving and reloading needs.

    Returns:
        A function that undoes this.

    Raises:
        ValueError: ``model`` has adapters, or a cache is enabled and the config needs data.
    """
    if adapters := getattr(model, "peft_config", None):
        raise ValueError(
            f"{type(model).__name__} has adapters ({', '.join(adapters)}), whose own linears would be quantized as "
            "well: merge or unload them, or quantize first and load them afterwards"
        )
    if config.needs_data:
        refuse_cached(model, type(model).__name__, "calibrated")
    return quantize_attached(model, loader, config, model_facts(model), attach, settings)


def attach(model: nn.Module, config: HfQuantConfig) -> None:
    """Attach to a quantized Hugging Face model what saving and reloading needs; leave other models alone.

    Args:
        model: already quantized in place.
        config: the model's own copy, including its plan.
    """
    match library(model):
        case "transformers":
            from hfquant.integrations.transformers import attach as attach_transformers

            attach_transformers(model, config)
        case "diffusers":
            from hfquant.integrations.diffusers import attach as attach_diffusers

            attach_diffusers(model, config)


def note_distillation(model: nn.Module, facts: dict[str, Any], data: Any) -> None:
    """Add how a model was distilled to the provenance that its config stores.

    Other modules, and models that were quantized as a part of a larger one, carry no config and are left alone.

    Args:
        model: the distilled model.
        facts: settings and results, as JSON.
        data: the batches that it was trained on.
    """
    from hfquant.calibration.provenance import data_provenance
    from hfquant.integrations.sharing.facts import config_of

    if library(model) and getattr(model.config, "quantization_config", None) is not None:
        config = config_of(model)
        config.provenance = {**config.provenance, "distilled": {**facts, "data": data_provenance(data)}}
