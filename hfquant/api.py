"""Public functions on models. Models of transformers and diffusers go through their integration, others do not."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from hfquant import distillation
from hfquant.integrations import batches_for, batches_of, model_facts, note_distillation, quantize_model
from hfquant.integrations.config import HfQuantConfig
from hfquant.nn.modules import dequantized, quant_modules
from hfquant.planner import Plan, plan_layers
from hfquant.run import Settings
from hfquant.search import Choice, search

__all__ = ["dequantize", "distill", "plan", "quantize", "search_bits"]


def quantize(
    model: nn.Module,
    calib_data_loader: Any,
    config: Any = None,
    per_layer_mode: bool = False,
    verbose: bool = False,
    example: Any = None,
    *,
    memory_budget: int | None = None,
    resume_dir: str | os.PathLike[str] | None = None,
    held_out: Any = None,
) -> nn.Module:
    """Quantize the layers of ``model`` in place and return it.

    Under ``accelerate launch``, every process calls this with its own copy of the model and either the same data or its
    own part of it. If the config needs data, the processes share the work. All of them end up with the same model.

    Args:
        model: any module. If quantization fails or is interrupted, the model is left unchanged.
        calib_data_loader: calibration batches. Each is a tensor, a tuple (or list of tensors) of positional arguments,
            a dict of keyword arguments, or a list of such samples. The loader must start over each time it is iterated.
            Alternatively a source of batches: a ``datasets`` object, a file path, or a dict naming a dataset (see
            :func:`~hfquant.calibration.calibration_batches`). None uses the config's ``calibration``; if that is also
            None and the config needs data, a transformers model generates its own, as it does for "self".
        config: a dict, the name of a preset, an :class:`~hfquant.HfQuantConfig`, or None (the reference
            implementation's dict).
        per_layer_mode: solve layers in execution order, each on the outputs of the quantized layers before it.
        verbose: log each layer's decision and error, and the full report at the end, on the console even if logging is
            not configured.
        example: model input for pattern detection; default: the first calibration sample.
        memory_budget: bytes of statistics that this process may hold at once; default: a quarter of the free memory,
            divided among the processes on this machine.
        resume_dir: folder that stores solved layers, so that an interrupted run can resume. The model, config, mode and
            data, including its order, must be the same.
        held_out: batches kept out of calibration, on which the guard (:mod:`hfquant.guard`) checks the result; default:
            the ones set aside when a model generates its own data, or the samples that a dataset has beyond those
            requested, or else the first sample of ``calib_data_loader``.

    Raises:
        ConfigError: the config is invalid or does not fit a layer.
        CalibrationError: data is missing, empty, or has NaN or Inf.
        ValueError: the model is already quantized or group offloaded, has nothing to quantize, or differs between
            processes.
        OSError: ``resume_dir`` cannot be written to.
        RuntimeError: quantization failed in another process; the message names the process and the cause.
    """
    config = HfQuantConfig.of(config)
    _check_module(model)
    if getattr(model, "is_quantized", False):
        raise ValueError(f"{type(model).__name__} is already quantized; call hfquant.dequantize(model) first")
    settings = Settings(
        per_layer_mode or config.per_layer_mode,
        verbose,
        example,
        memory_budget,
        resume_dir,
        config.guard,
        None if held_out is None else batches_for(model, held_out, config),
    )
    quantize_model(model, batches_for(model, calib_data_loader, config), config, settings)
    return model


def plan(model: nn.Module, config: Any = None, example: Any = None) -> Plan:
    """Plan how each layer of ``model`` will be quantized. Needs no weights: the model may be on the meta device.

    Args:
        model: any module; :mod:`hfquant.nn.kinds` defines which layers can be quantized.
        config: a dict, the name of a preset, an :class:`~hfquant.HfQuantConfig`, or None (the reference
            implementation's defaults).
        example: model inputs for pattern detection: a tensor, positional arguments, or a dict of keyword arguments;
            None derives them from the model's own config if possible.

    Raises:
        ConfigError: the config is invalid, or does not fit a layer.
    """
    config = HfQuantConfig.of(config)
    _check_module(model)
    return plan_layers(model, config.rules, example, model_facts(model))


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a torch.nn.Module, got {type(model).__name__}; for a diffusion pipeline, "
            "use hfquant.quantize_pipeline"
        )


def dequantize(model: nn.Module) -> nn.Module:
    """Replace every quantized layer with a float layer of its original class, and fused experts likewise.

    Works in place. Activations are no longer quantized.

    Raises:
        ValueError: ``model`` has no quantized layer.
    """
    if not quant_modules(model):
        raise ValueError(f"{type(model).__name__} has no quantized layer")
    if hasattr(model, "hf_quantizer") and hasattr(model, "dequantize"):
        return cast(nn.Module, cast(Any, model).dequantize())
    return dequantized(model)


def distill(
    model: nn.Module,
    teacher: nn.Module,
    calibration: Any = None,
    steps: int = 100,
    learning_rate: float = 1e-3,
    seed: int = 0,
    rounding_steps: int = 0,
) -> distillation.Distilled:
    """Train the parameters that a quantized model keeps in float, in place, to match the float model's outputs.

    The checkpoint size does not change. :mod:`hfquant.distillation` describes what is trained and how; a
    step takes about as long as five forward passes of the float model. If held-out samples do not improve, the model is
    left unchanged; if they do, the model's config and its model card say how it was distilled.

    Args:
        model: quantized model, in memory.
        teacher: the float model; it must not share parameters with ``model``.
        calibration: data as for :func:`quantize`; with None or "self", a transformers model generates its own. Every
            fourth sample, at most 32 in all, is held out. For a denoiser, the data should cover all timesteps.
        steps: number of optimizer steps (Adam), each on one sample; 0 trains the rounding only.
        learning_rate: relative to the root mean square of each vector.
        seed: seed of the sample order.
        rounding_steps: number of steps, each on one sample, that train the codes first
            (:mod:`hfquant.learned_rounding`).

    Raises:
        ValueError: ``model`` is not quantized, or is offloaded, or shares a parameter with ``teacher``.
        CalibrationError: data is missing or empty, or is a single sample that is not a batch.
        FloatingPointError: a loss is not finite.
    """
    _check_module(model)
    _check_module(teacher)
    distillation.check(model, teacher)  # before a model spends minutes on generating data
    data = batches_of(teacher, calibration)
    found = distillation.distill(model, teacher, data, steps, learning_rate, seed, rounding_steps)
    if found.kept:
        facts = {"steps": steps, "learning_rate": learning_rate, "rounding_steps": rounding_steps}
        facts |= {"before": found.before, "after": found.after}
        note_distillation(model, facts, data)
    return found


def search_bits(
    model: nn.Module,
    calibration: Any,
    budget: float | str,
    choices: Sequence[Choice] = ("int4", "int6", "int8"),
    base: Any = "w4a16-gptq",
) -> dict[str, Any]:
    """Choose each layer's format or other settings under a budget, from measured effects. The model is not changed.

    All kinds of layers take part, including experts; those of one parameter get the same choice. :mod:`hfquant.search`
    describes what is measured.

    Args:
        model: model in full precision.
        calibration: data as for :func:`quantize`; every fourth sample is held out to evaluate choices.
        budget: a number up to 32 is stored bits per weight, scales included; a larger number is the total bytes of all
            layers in the search; the name of a preset means as many bytes as that preset takes.
        choices: what to choose from: names of number formats, which replace the base's weight format; fields of
            ``weight_quant``, such as ``{"type": "int3", "group_size": 128}``; fields of a layer's config; or names of
            presets.
        base: config for all other settings.

    Returns:
        A config dict: the settings of most layers, plus an entry for each layer that differs.

    Raises:
        ConfigError: a choice is unknown or does not fit the base.
        ValueError: the budget is below what the smallest choice takes, or ``model`` is already quantized.
        CalibrationError: the data is a single sample that is not a batch, or no layer ran.
    """
    _check_module(model)
    if quant_modules(model):
        raise ValueError(f"{type(model).__name__} is already quantized; call hfquant.dequantize(model) first")
    config = HfQuantConfig.of(base)
    data = batches_for(model, calibration, config)
    return search(model, data, budget, choices, config.rules, model_facts(model)).config
