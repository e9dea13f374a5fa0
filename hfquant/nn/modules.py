"""Quantized modules within a model: find them, put them in and take them out."""

from __future__ import annotations

import logging
from collections.abc import Collection

import torch
from accelerate.utils import align_module_device
from torch import nn

from hfquant.console import counted
from hfquant.nn.experts import QuantExperts
from hfquant.nn.linear import QuantLinear
from hfquant.replacing import replace_modules

logger = logging.getLogger(__name__)


def quant_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """Return the quantized linears of ``model`` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def quant_modules(model: nn.Module) -> dict[str, QuantLinear | QuantExperts]:
    """Return all modules of ``model`` with quantized weights by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (QuantLinear, QuantExperts))}


def set_real_quant(model: nn.Module, real_quant: bool = True) -> None:
    """Run every quantized linear on low-bit kernels (True) or on dequantized floats (False); the results agree.

    Raises:
        ValueError: ``model`` has no quantized linear.
    """
    layers = quant_modules(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no quantized linear")
    for layer in layers.values():
        layer.real_quant = real_quant


def dequantized(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Replace every quantized module of ``model`` by what it was in floats of ``dtype``, in place; return the model."""
    floats: dict[nn.Module, nn.Module] = {}
    for layer in quant_modules(model).values():
        # Offloaded weights are fetched for the moment.
        with align_module_device(layer):
            made = layer.to_linear(dtype) if isinstance(layer, QuantLinear) else layer.dequantized(dtype)
            floats[layer] = made.requires_grad_()
    replace_modules(model, floats)
    return model


def log_share(model: nn.Module, uncounted: Collection[str] = ()) -> None:
    """Log what share of the model's matrices was quantized, embeddings and ``uncounted`` aside; warn below 80 %."""
    layers = quant_modules(model).values()
    quantized = sum(layer.matrix_size for layer in layers)
    aside = [m for n, m in model.named_modules() if n in uncounted or isinstance(m, nn.Embedding)]
    excluded = {id(p) for module in aside for p in module.parameters()}
    # The biases of experts have two dimensions too.
    excluded |= {id(tensor) for layer in layers for name in layer.specs() for tensor in [layer._parameters.get(name)]}
    kept = [(n, p) for n, p in model.named_parameters() if p.dim() > 1 and id(p) not in excluded]
    share = quantized / (quantized + sum(p.numel() for _, p in kept))
    largest = ", ".join(n for n, _ in sorted(kept, key=lambda item: -item[1].numel())[:3])
    logger.log(
        logging.INFO if share >= 0.8 else logging.WARNING,
        "%s quantized, %.0f %% of the parameters in matrices%s",
        counted(sum(layer.matrix_count for layer in layers), "linear"),
        100 * share,
        f"; the largest left: {largest}" if kept else "",
    )
