"""Quantized modules within a model: finding them, tying them, and converting them back."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

import torch
from accelerate.utils import align_module_device
from torch import nn

from hfquant.console import counted
from hfquant.nn.base import QuantModule
from hfquant.nn.experts import QuantExperts
from hfquant.nn.layer import QuantLayer
from hfquant.offload import lend, refuse_group_offloaded
from hfquant.replacing import replace_modules

logger = logging.getLogger(__name__)


def quant_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """Return the quantized layers of ``model`` by name, of any kind."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLayer)}


def quant_experts(model: nn.Module) -> dict[str, QuantExperts]:
    """Return the modules of quantized experts of ``model`` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantExperts)}


def quant_modules(model: nn.Module) -> dict[str, QuantModule]:
    """Return all modules of ``model`` with quantized weights by name, including fused experts."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantModule)}


def set_real_quant(model: nn.Module, real_quant: bool = True) -> None:
    """Run every quantized layer on low-bit kernels (True) or on dequantized floats (False); the results agree.

    Raises:
        ValueError: ``model`` has no quantized layer.
    """
    layers = quant_modules(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no quantized layer")
    for layer in layers.values():
        layer.real_quant = real_quant


def tie(model: nn.Module) -> None:
    """Make each tied quantized layer share codes and scales with the layer that it is tied to."""
    layers = quant_layers(model)
    for layer in layers.values():
        if layer.plan.tied:
            owner = layers[layer.plan.tied]
            layer.borrow(owner)
            lend(owner, layer, [name for name in layer.plan.tensors() if name.startswith("weight")])


def dequantized(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every quantized module of ``model`` with its float module, in place, and return the model.

    Args:
        model: any model.
        dtype: dtype of the float modules; by default what each had, or what the model has been cast to since.

    Raises:
        ValueError: the model is group offloaded.
    """
    refuse_group_offloaded(model)
    floats: dict[nn.Module, nn.Module] = {}
    layers = quant_layers(model)
    for module in quant_modules(model).values():
        # Fetch offloaded weights temporarily.
        with align_module_device(module):
            floats[module] = module.to_float(dtype).requires_grad_()
    for layer in (x for x in layers.values() if x.plan.tied):
        floats[layer].weight = floats[layers[layer.plan.tied]].weight
    replace_modules(model, floats)
    return model


def quantized_share(
    model: nn.Module, layers: Mapping[str, int], uncounted: Collection[str] = ()
) -> tuple[float, list[str]]:
    """Return the quantized share of the parameters in matrices, and the largest matrices that are not quantized.

    Args:
        model: quantized or yet to be quantized, possibly on the meta device.
        layers: number of weights of each quantized layer or experts parameter, by name.
        uncounted: names of further modules to ignore (output heads); embeddings are always ignored.
    """
    quantized = sum(layers.values())
    aside = [m for n, m in model.named_modules() if n in uncounted or isinstance(m, nn.Embedding)]
    excluded = {id(p) for module in aside for p in module.parameters()}
    parameters = [(n, p) for n, p in model.named_parameters() if n.removesuffix(".weight") not in layers]
    # Biases of experts have two dimensions as well.
    excluded |= {id(p) for n, p in parameters if n.removesuffix("_bias") in layers}
    kept = [(n, p.numel()) for n, p in parameters if p.dim() > 1 and id(p) not in excluded]
    share = quantized / max(quantized + sum(size for _, size in kept), 1)
    return share, [name for name, _ in sorted(kept, key=lambda item: -item[1])[:3]]


def log_share(model: nn.Module, uncounted: Collection[str] = ()) -> None:
    """Log the quantized share of the model's matrices; warn below 80 %.

    Embeddings and ``uncounted`` are ignored unless they were quantized.
    """
    # Tied layers share their weights.
    layers = {
        name: 0 if layer.plan.tied else layer.plan.in_features * layer.plan.out_features
        for name, layer in quant_layers(model).items()
    }
    experts = quant_experts(model)
    for name, module in experts.items():
        layers |= {f"{name}.{p}".lstrip("."): size for p, size in module.sizes().items()}
    count = len(layers) + sum((module.expert_count - 1) * len(module.plans) for module in experts.values())
    share, largest = quantized_share(model, layers, uncounted)
    logger.log(
        logging.INFO if share >= 0.8 else logging.WARNING,
        "%s quantized, %.0f %% of the parameters in matrices%s",
        counted(count, "layer"),
        100 * share,
        f"; the largest left: {', '.join(largest)}" if largest else "",
    )
