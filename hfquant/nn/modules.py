"""Quantized modules within a model: find them, put them in and take them out."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

import torch
from accelerate.utils import align_module_device
from torch import nn

from hfquant.console import counted
from hfquant.nn.linear import QuantLinear
from hfquant.offload import copy_hook, refuse_group_offloaded

logger = logging.getLogger(__name__)


def quant_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """Return the quantized linears of ``model`` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def set_real_quant(model: nn.Module, real_quant: bool = True) -> None:
    """Run every quantized linear on low-bit kernels (True) or on dequantized floats (False); the results agree.

    Raises:
        ValueError: ``model`` has no quantized linear.
    """
    layers = quant_linears(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no quantized linear")
    for layer in layers.values():
        layer.real_quant = real_quant


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put each value in the place of its key, wherever ``model`` refers to it; accelerate's hooks move along."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                new = replacements[child]
                new.training = child.training
                parent._modules[name] = new
    for old, new in replacements.items():
        copy_hook(old, new)


def dequantized(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Replace every QuantLinear of ``model`` by a plain ``nn.Linear`` of ``dtype``, in place, and return the model.

    Raises:
        ValueError: the model is group offloaded.
    """
    refuse_group_offloaded(model)
    linears: dict[nn.Module, nn.Module] = {}
    for layer in quant_linears(model).values():
        # Offloaded weights are fetched for the moment.
        with align_module_device(layer):
            linears[layer] = layer.to_linear(dtype).requires_grad_()
    replace_modules(model, linears)
    return model


def quantized_share(
    model: nn.Module, layers: Mapping[str, int], uncounted: Collection[str] = ()
) -> tuple[float, list[str]]:
    """Return the share of the parameters in matrices that are quantized, and the largest matrices that are not.

    Args:
        model: quantized or still to be, perhaps on the meta device.
        layers: the weights of each quantized layer, by name.
        uncounted: names of modules that do not count, beside embeddings (output heads).
    """
    quantized = sum(layers.values())
    aside = [m for n, m in model.named_modules() if n in uncounted or isinstance(m, nn.Embedding)]
    excluded = {id(p) for module in aside for p in module.parameters()}
    excluded |= {id(getattr(model.get_submodule(name), "weight", None)) for name in layers}
    kept = [(n, p.numel()) for n, p in model.named_parameters() if p.dim() > 1 and id(p) not in excluded]
    share = quantized / max(quantized + sum(size for _, size in kept), 1)
    return share, [name for name, _ in sorted(kept, key=lambda item: -item[1])[:3]]


def log_share(model: nn.Module, uncounted: Collection[str] = ()) -> None:
    """Log what share of the model's matrices was quantized, embeddings and ``uncounted`` aside; warn below 80 %."""
    layers = {name: layer.in_features * layer.out_features for name, layer in quant_linears(model).items()}
    share, largest = quantized_share(model, layers, uncounted)
    logger.log(
        logging.INFO if share >= 0.8 else logging.WARNING,
        "%s quantized, %.0f %% of the parameters in matrices%s",
        counted(len(layers), "linear"),
        100 * share,
        f"; the largest left: {', '.join(largest)}" if largest else "",
    )
