"""Layers that get more bits than the config's types have, because this costs next to nothing and can matter most.

The last projection of a denoiser holds a thousandth of its weights, yet no norm or other layer follows it to even out
the effect of its rounding on the image.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from hfquant.formats.integer import IntegerFormat
from hfquant.layer_config import InputQuant, LayerConfig, WeightQuant
from hfquant.layer_plan import LayerPlan

#: The index of a repeated block in a module's name.
_INDEX = re.compile(r"(?:^|\.)\d+(?:\.|$)")


def left_in_float(layers: dict[str, LayerConfig], sizes: Mapping[str, int]) -> dict[str, str]:
    """Return the layers outside repeated blocks that stay in full precision by ``float_share``, and why.

    Args:
        layers: the configs of the candidates, in execution order.
        sizes: number of weights of each layer of the model that is to be quantized.
    """
    shares = {n: config.float_share for n, config in reversed(layers.items()) if not _INDEX.search(n)}
    smallest = _smallest(shares, sizes, sum(sizes.values()))
    return {name: f"{share:.2%} of all weights, within float_share" for name, share in smallest}


def with_wider_inputs(layers: Mapping[str, LayerPlan], rows: Mapping[str, int]) -> dict[str, LayerPlan]:
    """Return the plans of layers whose inputs become INT8, by ``input_quant.int8_share``.

    Args:
        layers: plans by name.
        rows: number of rows that each layer multiplied in a forward; if empty, all layers count as equal.
    """
    sizes = {n: (rows.get(n, 0) if rows else 1) * p.in_features * p.out_features for n, p in layers.items()}
    wider = {}
    for name, share in _smallest(
        {n: _int8_share(p.config.input_quant) for n, p in layers.items()}, sizes, sum(sizes.values())
    ):
        plan = layers[name]
        quant = plan.config.input_quant
        assert quant is not None
        inputs = quant.model_copy(update={"type": "int8", "int8_share": 0.0})
        evidence = (*plan.evidence, f"INT8 inputs: {share:.2%} of all multiplications")
        wider[name] = replace(plan, config=plan.config.model_copy(update={"input_quant": inputs}), evidence=evidence)
    return wider


def with_wider_weights(layers: dict[str, LayerPlan]) -> dict[str, LayerPlan]:
    """Return the plans of layers outside repeated blocks whose weights become INT8, by ``weight_quant.int8_share``."""
    sizes = {name: plan.in_features * plan.out_features for name, plan in layers.items()}
    shared = {plan.tied for plan in layers.values()}
    # Among equals, the last to run comes first: nothing follows it that could even out its error.
    alone = {n: p for n, p in reversed(layers.items()) if not _INDEX.search(n) and not p.tied and n not in shared}
    wider = {}
    for name, share in _smallest(
        {n: _int8_share(p.config.weight_quant) for n, p in alone.items()}, sizes, sum(sizes.values())
    ):
        plan = layers[name]
        weight = plan.config.weight_quant.model_copy(update={"type": "int8", "int8_share": 0.0})
        evidence = (*plan.evidence, f"INT8 weights: {share:.2%} of all weights")
        wider[name] = replace(plan, config=plan.config.model_copy(update={"weight_quant": weight}), evidence=evidence)
    return wider


def _int8_share(quant: InputQuant | WeightQuant | None) -> float:
    """Return the share that may become INT8; 0 unless the type is an integer format of fewer than 8 bits."""
    narrow = quant is not None and isinstance(quant.format, IntegerFormat) and quant.format.bits < 8
    return quant.int8_share if quant is not None and narrow else 0.0


def _smallest(shares: Mapping[str, float], sizes: Mapping[str, int], total: int) -> Iterator[tuple[str, float]]:
    """Take layers from the smallest up, and yield each one's name and its fraction of ``total``.

    A layer is skipped if with it, the sum of those taken would exceed its share of ``total``. Of equal layers, the one
    listed first comes first.
    """
    taken = 0
    for name in sorted(shares, key=lambda name: sizes[name]):
        if shares[name] and taken + sizes[name] <= shares[name] * total:
            taken += sizes[name]
            yield name, sizes[name] / max(total, 1)
