"""Post-training quantization of a model in memory: plan -> observe -> solve -> swap."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import nn
from tqdm.auto import tqdm

from hfquant import integrations
from hfquant.integrations.checkpoint import dequantized
from hfquant.integrations.config import HfQuantConfig
from hfquant.linear import QuantLinear, log_real_quant, quant_linears, replace_modules
from hfquant.observers import CalibrationError, LayerStats, batches, observe, samples
from hfquant.planner import Plan, aliases, plan_layers
from hfquant.solver import solve

logger = logging.getLogger(__name__)


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
) -> nn.Module:
    """Quantize the linears of ``model`` in place and return it.

    Args:
        model: any module. Where quantization fails it is left as it was.
        calib_data_loader: batches for calibration; each a tensor, a tuple of positional arguments, a dict of keyword
            arguments, or a list of such samples. Must start anew each time it is iterated. May be None where the
            config needs no data.
        config: a dict, the name of a preset, an :class:`~hfquant.HfQuantConfig`, or None (the reference's dict).
        per_layer_mode: solve layers in execution order, each on inputs that the quantized layers before it produce.
        verbose: log each layer's decision.
        example: model input for pattern detection; default: the first calibration batch.
        memory_budget: bytes that statistics may take at once; default: a quarter of the free memory.
        resume_dir: folder that keeps solved layers, so that an interrupted run goes on.

    Raises:
        ConfigError: the config is invalid or does not fit a layer.
        CalibrationError: data is missing, empty, or has NaN or Inf.
        ValueError: the model is already quantized, or has nothing to quantize.
    """
    config = HfQuantConfig.of(config)
    if quant_linears(model) or getattr(model, "is_quantized", False):
        raise ValueError(f"{type(model).__name__} is already quantized; call hfquant.dequantize(model) first")
    for name, value in (("per_layer_mode", per_layer_mode or config.per_layer_mode), ("resume_dir", resume_dir)):
        if value:
            raise NotImplementedError(f"{name} is not built yet")
    return _quantize(model, calib_data_loader, config, verbose, example)


def _quantize(model: nn.Module, loader: Any, config: HfQuantConfig, verbose: bool = False, example: Any = None) -> Any:
    if loader is not None:
        loader = batches(loader)
        example = samples(next(iter(loader)))[0] if example is None else example
    plan = plan_layers(model, config.rules, config.modules_to_not_convert or (), example)
    if not plan.layers:
        raise ValueError(f"{type(model).__name__} has nothing to quantize: {plan.skipped or 'no nn.Linear'}")
    layers = _solve(model, plan, _statistics(model, plan, loader), verbose)
    replace_modules(model, {model.get_submodule(name): layer for name, layer in layers.items()})
    final = Plan({name: layer.plan for name, layer in layers.items()}, plan.skipped)
    integrations.attach(model, own_config(model, config, final))
    log_real_quant(model)
    log_share(model)
    return model


def _statistics(model: nn.Module, plan: Plan, loader: Any) -> dict[str, LayerStats]:
    needy = [name for name, layer in plan.layers.items() if layer.config.needs_data]
    if not needy:
        return {}
    if loader is None:
        raise CalibrationError(f"layer {needy[0]!r} (and {len(needy) - 1} more) needs calibration data; none was given")
    stats = observe(model, {name: model.get_submodule(name) for name in needy}, loader)
    if not stats:
        raise CalibrationError("calibration data: none of the layers to quantize ran")
    unseen = [name for name in needy if name not in stats]
    if unseen:
        logger.warning(
            "%d layers never ran during calibration (%s ...): rounded to nearest, activations scaled by token at run time",
            len(unseen),
            ", ".join(unseen[:3]),
        )
    return stats


def _solve(model: nn.Module, plan: Plan, stats: Mapping[str, LayerStats], verbose: bool) -> dict[str, QuantLinear]:
    layers: dict[str, QuantLinear] = {}
    for name, layer_plan in tqdm(plan.layers.items(), "quantizing"):
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        # Offloaded weights are fetched for the moment.
        with align_module_device(linear):
            solved, tensors = solve(name, linear.weight.detach(), layer_plan, stats.get(name))
            layers[name] = QuantLinear.from_tensors(solved, tensors, linear.bias)
        if verbose:
            logger.info("%s: %s", name, layers[name].extra_repr())
    return layers


def check_data(config: HfQuantConfig) -> None:
    """Raise where a config needs calibration data and carries none."""
    if config.needs_data and config.calibration is None:
        raise CalibrationError(
            "this config needs calibration data (static activations, smoothing, a low-rank branch or GPTQ): pass "
            "HfQuantConfig(..., calibration=[...]), or choose one without, such as 'w8a8-dynamic'"
        )


def quantize_loaded(model: nn.Module, config: HfQuantConfig) -> Any:
    """Quantize a model that ``from_pretrained`` has just loaded, with the data its config carries."""
    return _quantize(model, config.calibration, config)


def own_config(model: nn.Module, config: HfQuantConfig, plan: Plan) -> HfQuantConfig:
    """The model's own copy of ``config``, with each layer's plan where it differs from the config's own rule."""
    found = {n: p.differences(config.rules.resolve(*aliases(n, model))) for n, p in plan.layers.items()}
    return config.for_model({n: difference for n, difference in found.items() if difference}, list(plan.skipped))


def log_share(model: nn.Module) -> None:
    """Say what share of the model's matrices was quantized (embeddings and heads aside); warn below 80 %."""
    quantized = sum(layer.in_features * layer.out_features for layer in quant_linears(model).values())
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    codes = {id(layer.weight) for layer in quant_linears(model).values()}
    kept = [(n, p) for n, p in model.named_parameters() if p.dim() > 1 and id(p) not in embeddings | codes]
    share = quantized / (quantized + sum(p.numel() for _, p in kept))
    level = logging.INFO if share >= 0.8 else logging.WARNING
    largest = ", ".join(n for n, _ in sorted(kept, key=lambda item: -item[1].numel())[:3])
    logger.log(
        level,
        "%d linears quantized, %.0f %% of the parameters in matrices%s",
        len(codes),
        100 * share,
        f"; the largest left: {largest}" if kept else "",
    )


def dequantize(model: nn.Module) -> nn.Module:
    """Replace every quantized linear by a plain ``nn.Linear``, in place; activations are no longer quantized.

    Raises:
        ValueError: ``model`` has no quantized linear.
    """
    layers = quant_linears(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no quantized linear")
    if hasattr(model, "hf_quantizer") and hasattr(model, "dequantize"):
        return model.dequantize()
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return dequantized(model, dtype)
