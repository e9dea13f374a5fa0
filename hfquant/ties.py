"""Layers that have one weight: an embedding and the output head that is tied to it, mostly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from hfquant.layer_config import LayerConfig
from hfquant.nn.embedding import QuantEmbedding
from hfquant.nn.layer import QuantLayer


def tied_groups(model: nn.Module, tied: Mapping[str, str]) -> list[list[str]]:
    """Return the modules that have a weight in common, or are to be tied once loaded, the source first.

    Args:
        model: perhaps on the meta device, where nothing is tied yet.
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
    """Return the configs by which layers that have one weight are quantized with one set of codes; {} where not.

    An embedding and what is tied to it go together, where all of them are to be quantized, or stay as they are. A
    transform, or a rounding by the inputs of one of them, would change the weight for the others too.

    Args:
        group: names, the layer that is to hold the codes first.
        open_to: the configs of all layers that nothing but a tie keeps from being quantized.
        kinds: of all layers.
    """
    if not all(name in open_to for name in group) or not any(kinds[name] is QuantEmbedding for name in group):
        return {}
    configs = {name: open_to[name].plain() for name in group}
    weight = configs[group[0]].weight_quant
    for name, config in configs.items():
        # Parts of an input would give the weight scales that the others have not.
        inputs = config.input_quant and config.input_quant.model_copy(update={"segments": 1})
        update = {"weight_quant": weight, "input_quant": inputs, "seglinear": False}
        configs[name] = config.model_copy(update=update)
    return configs
