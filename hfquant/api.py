"""The public functions on models: a model of transformers or diffusers goes through its integration, others do not."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from hfquant import distillation
from hfquant.integrations import batches_for, batches_of, model_facts, quantize_model
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

    Under ``accelerate launch`` all processes call this, each with its copy of the model and the same data (or each with
    its own part); they share the work of a config that needs data, and all end with the same model.

    Args:
        model: any module. Where quantization fails, or is interrupted, it is left as it was.
        calib_data_loader: batches for calibration; each a tensor, a tuple (or list of tensors) of positional arguments,
            a dict of keyword arguments, or a list of such samples. Must start anew each time it is iterated. Or a
            source of such batches: a ``datasets`` object, a file's path, a dict naming a dataset (see
            :func:`~hfquant.calibration.calibration_batches`). None takes the config's ``calibration``; where that is
            None too and the config needs data, a transformers model makes its own, as it does for "self".
        config: a dict, the name of a preset, an :class:`~hfquant.HfQuantConfig`, or None (the reference's dict).
        per_layer_mode: solve layers in execution order, each on inputs that the quantized layers before it produce.
        verbose: log each layer's decision and error, and the whole report at the end; shown on the console even where
            logging is not set up.
        example: model input for pattern detection; default: the first calibration batch.
        memory_budget: bytes that statistics may take at once in this process; default: a quarter of the free memory,
            shared with the processes on this machine.
        resume_dir: folder that keeps solved layers, so that an interrupted run goes on where it stopped: with the same
            model, config, mode and data in the same order.
        held_out: batches kept out of calibration, for the guard to check the result on (:mod:`hfquant.guard`); default:
            those that a model which makes its own data keeps, what a dataset has beyond the samples asked for, else the
            first sample of ``calib_data_loader``.

    Raises:
        ConfigError: the config is invalid or does not fit a layer.
        CalibrationError: data is missing, empty, or has NaN or Inf.
        ValueError: the model is already quantized or group offloaded, has nothing to quantize, or differs from another
            process'.
        OSError: ``resume_dir`` cannot be written.
        RuntimeError: it failed in another process, which the message names with its cause.
    """
    config = HfQuantConfig.of(config)
    _check_module(model)
    if getattr(model, "is_quantized", False):
        raise ValueError(f"{type(model).__name__} is already quantized; call hfquant.dequantize(model) first")
    settings = Settings(
        config.modules_to_not_convert or (),
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
    """Decide what every layer of ``model`` will become. Needs no weights: the model may be on the meta device.

    Args:
        model: any module; what can be quantized of it, :mod:`hfquant.nn.kinds` says.
        config: a dict, the name of a preset, an :class:`~hfquant.HfQuantConfig`, or None (the reference's defaults).
        example: model inputs for pattern detection: a tensor, positional arguments, or a dict of keyword arguments;
            None derives them from the model's own config where that is possible.

    Raises:
        ConfigError: the config is invalid, or does not fit a layer.
    """
    config = HfQuantConfig.of(config)
    _check_module(model)
    return plan_layers(model, config.rules, config.modules_to_not_convert or (), example, model_facts(model))


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a torch.nn.Module, got {type(model).__name__}; a diffusion pipeline goes to "
            "hfquant.quantize_pipeline"
        )


def dequantize(model: nn.Module) -> nn.Module:
    """Replace every quantized layer by the float one that it was, and experts by the float ones of their class.

    In place; activations are no longer quantized.

    Raises:
        ValueError: ``model`` has no quantized layer.
    """
    if not quant_modules(model):
        raise ValueError(f"{type(model).__name__} has no quantized layer")
    if hasattr(model, "hf_quantizer") and hasattr(model, "dequantize"):
        return cast(nn.Module, cast(Any, model).dequantize())
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return dequantized(model, dtype)


def distill(
    model: nn.Module,
    teacher: nn.Module,
    calibration: Any = None,
    steps: int = 100,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> distillation.Distilled:
    """Train what a quantized model keeps in float, in place, until it gives what the float model gives.

    Codes and the size of the checkpoint stay. What is trained, and how, says :mod:`hfquant.distillation`; a step takes
    about as long as four forwards of the float model. Where held-out samples do not gain, the model stays as it was.

    Args:
        model: quantized, in memory.
        teacher: the float model; it shares no parameter with ``model``.
        calibration: what :func:`quantize` takes; None and "self": what a model of transformers makes itself. Every
            fourth sample judges. A denoiser's should be of all timesteps.
        steps: of the optimizer (Adam), each on one sample.
        learning_rate: relative to the root mean square of a vector.
        seed: of the samples' order.

    Raises:
        ValueError: ``model`` is not quantized, or is offloaded, or shares a parameter with ``teacher``.
        CalibrationError: data is missing or empty, or a single sample that is no batch.
        FloatingPointError: a loss is not finite.
    """
    _check_module(model)
    _check_module(teacher)
    return distillation.distill(model, teacher, batches_of(teacher, calibration), steps, learning_rate, seed)


def search_bits(
    model: nn.Module,
    calibration: Any,
    budget: float | str,
    choices: Sequence[Choice] = ("int4", "int6", "int8"),
    base: Any = "w4a16-gptq",
) -> dict[str, Any]:
    """Choose a format, or more, for each layer under a budget, from measured effects; the model is left as it is.

    Layers of every kind take part, experts too, those of one parameter together. What is measured, and what it takes,
    says :mod:`hfquant.search`.

    Args:
        model: in full precision.
        calibration: what :func:`quantize` takes; every fourth sample judges.
        budget: at most 32: stored bits a weight, scales included; more: bytes of all layers that are chosen for; the
            name of a preset: as many bytes as it takes.
        choices: what to choose from: names of number formats, which take the place of the base's weight format; fields
            of ``weight_quant``, such as ``{"type": "int3", "group_size": 128}``; fields of a layer's config; or names
            of presets.
        base: config that says all else.

    Returns:
        A config's dict: what most layers have, and an entry for each layer that differs.

    Raises:
        ConfigError: unknown choices, or a base that they do not fit.
        ValueError: the budget is less than the smallest choice takes, or ``model`` is already quantized.
        CalibrationError: a single sample that is no batch, or none of the layers ran.
    """
    _check_module(model)
    if quant_modules(model):
        raise ValueError(f"{type(model).__name__} is already quantized; call hfquant.dequantize(model) first")
    config = HfQuantConfig.of(base)
    data = batches_for(model, calibration, config)
    not_convert = config.modules_to_not_convert or ()
    return search(model, data, budget, choices, config.rules, model_facts(model), not_convert).config
