"""Layers that share one weight, usually an embedding and the output head tied to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from hfquant.layer_config import LayerConfig
from hfquant.nn.embedding import QuantEmbedding
from hfquant.nn.layer import QuantLayer


def tied_groups(model: nn.Module, tied: Mapping[str, str]) -> list[list[str]]:
    """Return groups of modules that share a weight, or will be tied once loaded, with the source first.

    Args:
        model: any model; on the meta device, nothing may be tied yet.
        tied: module -> the module whose weight it gets.
    """
    owners: dict[Any, list[str]] = {}
    for name, module in model.named_modules():
        for param in module._parameters.values():
            if param is not None:
                owners.setdefault(id(param), []).append(name)
    weights = {id(module._parameters.get("weight")) for module in model.modules()}
    groups = [dict.fromkeys(names) for param, names in owners.items() if param in weights]
    for name, source in tied.items():
        found = [g for g in groups if name in g or source in g] + [dict.fromkeys((source, name))]
        groups = [g for g in groups if g not in found] + [{n: None for g in found for n in g}]
    sources = set(tied.values())
    return [sorted(g, key=lambda n: n not in sources) for g in groups if len(g) > 1]


def configs_together(
    group: Sequence[str], open_to: Mapping[str, LayerConfig], kinds: Mapping[str, type[QuantLayer]]
) -> dict[str, LayerConfig]:
    """Return the configs to quantize layers that share a weight to one set of codes; {} if they cannot be.

    An embedding and the layers tied to it are quantized together if all of them are to be quantized. A transform, or a
    rounding method based on the inputs of one of them, would change the weight for the others too, so neither is used.

    Args:
        group: layer names, starting with the layer that holds the codes.
        open_to: the configs of all layers that can be quantized apart from ties.
        kinds: the kinds of all layers.
    """
    if not all(name in open_to for name in group) or not any(kinds[name] is QuantEmbedding for name in group):
        return {}
    configs = {name: open_to[name].plain() for name in group}
    weight = configs[group[0]].weight_quant
    for name, config in configs.items():
        # Splitting the input would give the weight scales that the other layers do not have.
        inputs = config.input_quant and config.input_quant.model_copy(update={"segments": 1})
        update = {"weight_quant": weight, "input_quant": inputs, "seglinear": False}
        configs[name] = config.model_copy(update=update)
    return configs
